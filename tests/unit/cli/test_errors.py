"""Errors on the command line: one line each, with the name that the user typed and without its value."""

import gc
import threading
from pathlib import Path

import pytest
from tests.unit.cli.runner import error

SECRET = "correct-horse"  # noqa: S105
SECRET_URL = f"redis://:{SECRET}@cache"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["setings"], "setings: no such command; did you mean settings?"),
        (["sreve"], "sreve: no such command; did you mean serve?"),
        (["version"], "version: no such command; did you mean --version?"),
        (["keys", "nw"], "nw: no such command; did you mean new?"),
        (["weights", "zzz"], "zzz: no such command; see llama2-server weights --help"),
        (["keys"], "keys: missing command; choose new or list or limit or revoke or rotate"),
        ([SECRET_URL], "no such command; see llama2-server --help"),
        (
            ["--reflection", "settings"],
            "settings: a command must be the first argument, as in `llama2-server settings …`",
        ),
    ],
)
def test_misspelt_command_is_never_called_a_flag(arguments: list[str], message: str) -> None:
    """The error suggests the closest command; a word that may be a secret is not repeated."""
    assert error(*arguments) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lisen", SECRET_URL], "--lisen: no such option; did you mean --listen?"),
        ([f"--lisen={SECRET_URL}"], "--lisen: no such option; did you mean --listen?"),
        (["serve", "--max-queue", "3"], "--max-queue: no such option; did you mean --max-queue-size?"),
        (["settings", "--no-reflexion"], "--no-reflexion: no such option; did you mean --no-reflection?"),
        (["--verison"], "--verison: no such option; did you mean --version?"),
        (["usage", "--acount", "42"], "--acount: no such option; did you mean --account?"),
        (["weights", "fetch", "--too", "x"], "--too: no such option; did you mean --to?"),
        (["-x"], "-x: no such option; see llama2-server serve --help"),
    ],
)
def test_misspelt_flag_gets_a_suggestion(arguments: list[str], message: str) -> None:
    """The error suggests the closest flag, and does not repeat the value."""
    assert error(*arguments) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-queue-size"], "--max-queue-size: requires a value; see llama2-server serve --help"),
        (["--redis-url", "--listen", "x"], "--redis-url: requires a value; see llama2-server serve --help"),
        ([f"--reflection={SECRET}"], "--reflection: does not take a value; see llama2-server serve --help"),
        (["settings", SECRET_URL], "unexpected argument; see llama2-server settings --help"),
        (["--no-reflection", SECRET], "unexpected argument; see llama2-server serve --help"),
        (["usage", SECRET_URL], "no such command; see llama2-server usage --help"),
        (["keys", "new", "42", SECRET], "unexpected argument; see llama2-server keys new --help"),
        (["keys", "new"], "ACCOUNT: missing; see llama2-server keys new --help"),
        (["weights", "fetch", "org/name"], "--to: missing; see llama2-server weights fetch --help"),
    ],
)
def test_wrong_number_of_arguments(arguments: list[str], message: str) -> None:
    """Missing and additional arguments are named, but additional arguments are not repeated."""
    assert error(*arguments) == message


@pytest.mark.parametrize("default", [[], ["serve"]])
def test_serve_is_the_default_command(default: list[str]) -> None:
    """Options without a command are options of `serve`."""
    assert error(*default, "--max-queue-size", "-1") == "--max-queue-size: must be at least 0"


def test_serve_is_the_default_without_any_argument() -> None:
    """`llama2-server` alone serves with the environment's settings."""
    assert error(LLAMA2_MAX_QUEUE_SIZE="-1") == "LLAMA2_MAX_QUEUE_SIZE: must be at least 0"


def test_a_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    """The thread of the startup log ends, and the garbage collector runs."""
    error(
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--receipt-key",
        str(tmp_path / "missing"),
        "--data-directory",
        str(tmp_path),
    )
    assert "startup-log" not in {thread.name for thread in threading.enumerate()}
    assert gc.isenabled()
