"""Draws docs/terminal.svg: the README's commands, run for real against a demo server, as a terminal shows them.

python -m tools.terminal_picture
"""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COLUMNS = 100
COMMANDS = (
    ["generate", "Tell me a story about a fox who lives by the sea."],
    ["generate", "--temperature", "0", "--max-tokens", "200", "What is this service?"],
    ["generate", "--top-p", "2", "--max-tokens", "5000", "Hello"],
)


def main() -> None:
    """Run the commands and write the picture."""
    command = [str(BIN / "llama2-server"), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline() if server.stdout else ""
        address = line.split()[2].rstrip(".")
        shown = [f"$ {_typed(words)}\n{_run([*words], address)}" for words in COMMANDS]
        server.terminate()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(shown)))
    svg = console.export_svg(title="llama2-grpc")
    # The picture shall not fetch fonts from anywhere.
    svg = re.sub(r"@font-face\s*{.*?}", "", svg, flags=re.DOTALL)
    (ROOT / "docs" / "terminal.svg").write_text(svg, encoding="utf-8")


def _typed(words: list[str]) -> str:
    return "llama2 " + " ".join(f'"{word}"' if " " in word else word for word in words)


def _run(words: list[str], address: str) -> str:
    """What the command prints on a terminal, both of its streams."""
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LLAMA2_ADDRESS": address}
    with subprocess.Popen([str(BIN / "llama2"), *words], stdout=writer, stderr=writer, env=environment):
        os.close(writer)
        printed = b""
        while chunk := _read(reader):
            printed += chunk
    return printed.decode().replace("\r\n", "\n")


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 4096)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


if __name__ == "__main__":
    main()
