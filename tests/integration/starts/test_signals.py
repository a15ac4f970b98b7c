"""SIGINT and SIGTERM at named moments of a server process: one line, one exit code, no traceback."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.processes import command, environment, server
from tests.support.programs.paused_process import PAUSED
from tests.support.repository import ROOT

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


PROGRAMS = {
    "llama2-server": ("llama2_server.__main__", "20", "--listen", "127.0.0.1:0"),
    "llama2": ("llama2_client.cli.__main__", "3", "health"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_signal_at_any_import_ends_the_process(program: str, tmp_path: Path) -> None:
    """A signal inside hundreds of imports of any library has the same result, for the server and the client."""
    arguments = [*PROGRAMS[program], *(("--data-directory", str(tmp_path)) if program == "llama2-server" else ())]
    call = command(*arguments, module="tests.support.programs.signalled_imports")
    ended = subprocess.run(call, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    results = json.loads(ended.stdout)
    assert len(results) > 100
    for name, number, errors, code in results:
        line = f"{program}: stopped by {signal.Signals(number).name}\n"
        assert (name, errors, code) == (name, line, 128 + number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("program", "module"), [("llama2-server", "llama2_server"), ("llama2", "llama2_client.cli")])
def test_signal_while_python_starts_waits_for_the_handlers(program: str, module: str, number: signal.Signals) -> None:
    """A parent process that blocks the signals, as `make run` does, delays them until the program handles them."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            command("--help", module=module), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.send_signal(number)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    assert process.communicate(timeout=60) == ("", f"{program}: stopped by {number.name}\n")
    assert process.returncode == 128 + number


SHOW_MASK = """#!{python}
import signal, sys
print(sys.argv[1:], sorted(signal.Signals(n).name for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's env delays the signals")
def test_make_run_delays_signals_until_the_server_handles_them(tmp_path: Path) -> None:
    """`make run` starts the server with SIGINT, SIGTERM and SIGHUP blocked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "llama2-server"):
        (folder / name).write_text(SHOW_MASK.format(python=sys.executable))
        (folder / name).chmod(0o755)
    (tmp_path / ".server").touch()
    call = ["make", "--no-print-directory", "run", f"VENV={tmp_path}", "ARGS=--cpu"]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "['--cpu'] ['SIGHUP', 'SIGINT', 'SIGTERM']\n"


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
