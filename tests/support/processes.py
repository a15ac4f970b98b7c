"""Server processes for tests."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from tests.support.repository import ROOT


def command(*flags: str, module: str = "llama2_server") -> list[str]:
    """Return the command line that starts a server."""
    return [sys.executable, "-m", module, *flags]


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of this process without the developer's settings, plus `extra`."""
    # With CI set, transformers hands its warnings to the root logger, which no operator's server does.
    kept = {key: value for key, value in os.environ.items() if key != "CI" and not key.startswith("LLAMA2_")}
    return kept | extra


def free_ports(count: int) -> list[int]:
    """Return different loopback ports that were free a moment ago."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    return free_ports(1)[0]


def card_file(folder: Path, **config: object) -> Path:
    """Write the demo card to a file, with these entries in its constellation_config; None removes an entry."""
    shipped = ROOT / "server/llama2_server/cards/demo.yaml"
    document = next(yaml.safe_load_all(shipped.read_text()))
    properties = document["model"]["properties"]
    (entry,) = (entry for entry in properties if entry["property_id"] == "constellation_config")
    merged = yaml.safe_load(entry["value"]) | config
    entry["value"] = yaml.safe_dump({key: value for key, value in merged.items() if value is not None})
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@contextmanager
def server(
    data_directory: Path, *flags: str, listen: str = "127.0.0.1:0", module: str = "llama2_server"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server process, on a free port by default, and yield it and its address."""
    log = data_directory / "server.log"
    with (
        log.open("a") as errors,
        subprocess.Popen(
            command("--listen", listen, "--data-directory", str(data_directory), *flags, module=module),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(),
        ) as process,
    ):
        assert process.stdout is not None
        try:
            serving = re.match(r"SERVING on (\S+)\.", process.stdout.readline())
            assert serving, log.read_text()
            yield process, serving[1]
        finally:
            process.kill()
