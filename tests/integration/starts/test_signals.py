"""SIGINT and SIGTERM at named moments of a server process: one line, one exit code, no traceback."""

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest
from tests.support.processes import command, environment, server
from tests.support.programs.paused_process import PAUSED

SIGNALS = [signal.SIGINT, signal.SIGTERM]
# A moment before the event loop, by the module whose import the process has reached.
IMPORTS = {
    "command line": "click",
    "settings": "pydantic_settings",
    "checks": "llama2_server.lifecycle.preflight",
    "stores": "sqlalchemy",
    "torch": "torch",
    "service": "llama2_server.app",
}
# The same by the number of the import: moments that no test names.
RANDOM_IMPORTS = sorted(random.Random(20).sample(range(1, 1500), 4))
# A moment in the event loop, by the script of tests/support/scripted_process.py and the line that announces it.
SCRIPTS = {
    "loading": ("announces-and-never-loads", "loading"),
    "warm-up": ("hangs-in-the-warm-up", "in the first step"),
}


def end_before_serving(arguments: list[str], announcement: str, number: signal.Signals) -> None:
    """Start a process, signal it after its announcement, and check its only line and its exit code."""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{announcement}\n"
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert output == ""  # it never printed SERVING
    logged = [line for line in errors.splitlines() if line.startswith("{")]  # a thread may log last
    assert [line for line in errors.splitlines() if line not in logged] == [f"llama2-server: stopped by {number.name}"]
    assert all(json.loads(record)["level"] == "info" for record in logged)
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", IMPORTS)
def test_signal_during_an_import_ends_the_process(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    """Whatever the process imports, SIGINT ends it with 130 and SIGTERM with 143."""
    flags = [IMPORTS[moment], "--data-directory", str(tmp_path), "--listen", "127.0.0.1:0"]
    end_before_serving(command(*flags, module="tests.support.programs.paused_process"), PAUSED, number)


@pytest.mark.parametrize(("moment", "number"), [*zip(RANDOM_IMPORTS, SIGNALS * 2, strict=True)])
def test_signal_at_a_random_import_ends_the_process(moment: int, number: signal.Signals, tmp_path: Path) -> None:
    """A signal inside any import of any library has the same result."""
    flags = [str(moment), "--data-directory", str(tmp_path), "--listen", "127.0.0.1:0"]
    end_before_serving(command(*flags, module="tests.support.programs.paused_process"), PAUSED, number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", SCRIPTS)
def test_signal_before_serving_ends_the_process(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    """While the weights load, and in the first step of the warm-up, the exit codes are the same."""
    script, announcement = SCRIPTS[moment]
    flags = [script, "--data-directory", str(tmp_path), "--listen", "127.0.0.1:0"]
    end_before_serving(command(*flags, module="tests.support.scripted_process"), announcement, number)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_while_serving_drains(number: signal.Signals, tmp_path: Path) -> None:
    """A server that serves drains and exits with 0; its log has no traceback, and stderr no other line."""
    with server(tmp_path) as (process, _):
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
    records = [json.loads(line) for line in (tmp_path / "server.log").read_text().splitlines()]
    assert [record["level"] for record in records] == ["info"] * len(records)
    assert records[-1]["event"] == "stopped"
