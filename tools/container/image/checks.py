"""What the built image must have and do; each check has a line of the report."""

import re
from collections.abc import Iterator
from typing import Any

from tools.container.image.command import ImageError
from tools.container.image.container import Container

STORY = "Tell me a story about a fox who lives by the sea."
LIMIT_BYTES = 1_000_000_000
ENVIRONMENT = "opt/llama2"


def check_size(total: int) -> str:
    """Return the line of the report about the image's size in bytes.

    Raises:
        ImageError: the image has more than 1.0 GB.
    """
    return _line(total < LIMIT_BYTES, f"image: {total / 1e6:.0f} MB, the limit is {LIMIT_BYTES / 1e6:.0f} MB")


def check_container(container: Container, image: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each check of a running container; the last one stops it.

    Raises:
        ImageError: a check failed.
    """
    user, _, group = image["User"].partition(":")
    identifiers = (container.status("Uid").split(), container.status("Gid").split(), container.status("Groups"))
    yield _line(identifiers == ([user] * 4, [group] * 4, ""), f"user {user}, group {group}, and no other groups")
    first = container.status("NSpid").split()[-1]
    yield _line(first == "1", "the service is process number 1")
    sets = {kind: int(container.status(f"Cap{kind}"), 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
    yield _line(not any(sets.values()), f"no capabilities: {sets}")
    yield _line(container.status("NoNewPrivs") == "1", "it cannot gain privileges")
    yield _line(container.status("Seccomp") == "2", "a seccomp filter applies")
    for folder in ("/", "/tmp", f"/{ENVIRONMENT}"):  # noqa: S108, the test writes there to be rejected
        yield _line(
            "Read-only file system" in _error(container, "touch", f"{folder}/written"), f"{folder} is read-only"
        )
    health = container.exec(*image["Healthcheck"]["Test"][1:])
    yield _line("SERVING" in health, f"HEALTHCHECK over gRPC: {health.strip()}")
    story = container.exec("llama2", "generate", "--temperature", "0", STORY)
    yield _line("fox" in story, f"Generate: {' '.join(story.split())[:60]}…")
    usage = container.exec("llama2", "usage", "--json")
    yield _line(re.search(r'"requests": *"?[1-9]', usage) is not None, "the ledger on the volume has the request")
    written = sorted(path.name for path in container.bundle.volume.iterdir())
    yield _line("usage.db" in written, f"files on the volume: {', '.join(written)}")
    code = container.stop(image["StopSignal"])
    yield _line(code == 0, f"{image['StopSignal']} ends it with exit code {code}")


def _error(container: Container, *command: str) -> str:
    try:
        container.exec(*command)
    except ImageError as error:
        return str(error)
    return ""


def _line(passed: bool, text: str) -> str:
    if not passed:
        raise ImageError(f"FAILED  {text}")
    return f"ok      {text}"
