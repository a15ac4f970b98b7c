"""Draw docs/terminal.svg: the output of the README's commands, run in a terminal against a demo server.

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
    """Run the commands and write the SVG."""
    command = [str(BIN / "llama2-server"), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline() if server.stdout else ""
        address = line.split()[2].rstrip(".")
        sessions = [f"$ {_command_line(words)}\n{_run([*words], address)}" for words in COMMANDS]
        server.terminate()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(sessions)))
    svg = console.export_svg(title="llama2-grpc")
    # The picture must not download fonts.
    svg = re.sub(r"@font-face\s*{.*?}", "", svg, flags=re.DOTALL)
    (ROOT / "docs" / "terminal.svg").write_text(svg, encoding="utf-8")


def _command_line(words: list[str]) -> str:
    return "llama2 " + " ".join(f'"{word}"' if " " in word else word for word in words)


def _run(words: list[str], address: str) -> str:
    """Return what a client command prints on a terminal, both streams included."""
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LLAMA2_ADDRESS": address}
    with subprocess.Popen([str(BIN / "llama2"), *words], stdout=writer, stderr=writer, env=environment):
        os.close(writer)
        output = b""
        while chunk := _read(reader):
            output += chunk
    return output.decode().replace("\r\n", "\n")


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 4096)
    except OSError:  # on Linux: the other end is closed
        return b""


if __name__ == "__main__":
    main()
