"""Server processes that cannot start: one error line, exit code 2, and no slow imports before it."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.processes import command, environment

from llama2_server.card import load_card
from llama2_server.config.settings import Settings
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import HostStepRunner
from llama2_server.lifecycle import model_loading


def run(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a server process until it ends."""
    return subprocess.run(
        command(*flags), capture_output=True, text=True, timeout=60, env=environment(**variables), check=False
    )


def modules_imported_by(*flags: str) -> tuple[int, set[str]]:
    """Run a server process and return its exit code and the modules that it imported."""
    done = run(*flags, PYTHONPROFILEIMPORTTIME="1")
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.returncode, {line.rpartition("|")[2].strip() for line in lines}


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A loopback port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "extra", "words"),
    [
        (["--listen", "here"], {}, "--listen: must be HOST:PORT"),
        (["--listen", "0.0.0.0:1"], {}, "--listen: 0.0.0.0:1 is not a loopback address"),
        ([], {"LLAMA2_LISTEN": "nowhere:x"}, "LLAMA2_LISTEN: must be HOST:PORT"),
        (["--card", "no-such-card"], {}, "--card no-such-card: cannot be read"),
        (["--weights", "/no/such/directory"], {}, "--weights: /no/such/directory: not a directory and not an org/name"),
        (["--weights", "~no-such-account/x"], {}, "--weights: ~no-such-account/x: the home directory is unknown; pass"),
        (["--weights", "."], {}, "--weights: config.json: no such file; pass the directory of a Hugging Face"),
        (["--shutdown-grace-seconds", "-1"], {}, "--shutdown-grace-seconds: must be at least 0"),
        (["--api-keys-file", "/no/such/keys"], {}, "--api-keys-file: cannot read /no/such/keys: "),
        (
            ["--usage-url", "mysql://here"],
            {},
            "--usage-url: mysql is not supported; use postgresql://",
        ),
        (["--redis-url", "http://here"], {}, "--redis-url: "),
        (["--lisen", "x"], {}, "--lisen: no such option; did you mean --listen?"),
        (["--tls-certificate", "/no/such", "--tls-key", "/no/such"], {}, "--tls-certificate: cannot read /no/such: "),
        (["--tls-key", "/no/such"], {}, "--tls-certificate: missing; TLS needs both"),
        (["--metrics-listen", "192.0.2.1:1"], {}, "--metrics-listen: cannot listen on 192.0.2.1:1"),
        (
            ["--otlp-endpoint", "localhost:4317"],
            {},
            "--otlp-endpoint: localhost:4317 is not a valid endpoint; use http://HOST:PORT",
        ),
    ],
)
def test_invalid_settings_end_with_one_line(
    tmp_path: Path, flags: list[str], extra: dict[str, str], words: str
) -> None:
    """Invalid settings end the process with exit code 2 and one line that names the setting or the file."""
    done = run(*flags, **extra, XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 2
    *logged, last = done.stderr.splitlines()
    assert last.startswith("llama2-server: ")
    assert words in last
    assert all(json.loads(line)["level"] == "info" for line in logged)
    assert done.stdout == ""


@pytest.mark.parametrize("as_flag", [True, False])
def test_port_in_use_is_named(as_flag: bool, tmp_path: Path, taken_port: int) -> None:
    """A port in use ends the process with exit code 2; the error has the address and its setting."""
    address = f"127.0.0.1:{taken_port}"
    flags = ["--listen", address] if as_flag else []
    variables = {} if as_flag else {"LLAMA2_LISTEN": address}
    done = run("--data-directory", str(tmp_path), *flags, **variables)
    assert done.returncode == 2
    name = "--listen" if as_flag else "LLAMA2_LISTEN"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"llama2-server: {name}: cannot listen on {address}; the port is in use")


def run_without_home(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run a server process without HOME whose uid is in no passwd file, as in many containers."""
    hidden = "import pwd; pwd.getpwuid = {}.__getitem__; from llama2_server.cli.main import main; main()"
    variables = {key: value for key, value in environment().items() if key not in ("HOME", "XDG_STATE_HOME")}
    call = [sys.executable, "-c", hidden, *flags]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, env=variables, check=False)


@pytest.mark.parametrize("command_line", [[], ["settings"], ["usage"]])
def test_a_missing_home_directory_is_named(command_line: list[str]) -> None:
    """Without a home directory, the default of the data directory is unknown: one line, exit code 2."""
    done = run_without_home(*command_line)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("llama2-server: --data-directory: has no default, because HOME is not set and uid ")
    assert line.endswith("; pass a directory, or set HOME")


def test_no_home_directory_is_needed_with_a_data_directory(tmp_path: Path) -> None:
    """With a data directory, the server reaches the weights without a home directory."""
    done = run_without_home("--data-directory", str(tmp_path), "--weights", "~/x")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("llama2-server: --weights: ~/x: the home directory is unknown; pass")


@pytest.mark.parametrize(
    ("flags", "exit_code"),
    [(["--max-queue-size", "-1"], 2), (["--lisen", "x"], 2), (["--version"], 0), (["--help"], 0), (["settings"], 0)],
)
def test_fast_commands_import_no_slow_library(flags: list[str], exit_code: int) -> None:
    """Invalid settings are reported before the imports that take seconds; `--version` and `--help` need none."""
    returncode, imported = modules_imported_by(*flags)
    assert returncode == exit_code
    assert "llama2_server.config.settings" in imported
    assert not {"torch", "grpc", "transformers", "sqlalchemy"} & imported


def test_a_later_start_of_the_demo_imports_no_slow_library(tmp_path: Path) -> None:
    """Once the configuration is cached, the demo model loads without transformers, tokenizers and Jinja."""
    program = (
        "import sys; from llama2_server.card import load_card; from llama2_server.config.settings import Settings; "
        "from llama2_server.lifecycle.model_loading import load_model; "
        f"load_model(Settings(data_directory={str(tmp_path)!r}, device='cpu'), load_card('demo')); "
        "print({'transformers', 'tokenizers', 'jinja2'} & set(sys.modules))"
    )
    for _ in range(2):
        call = [sys.executable, "-c", program]
        done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == "set()\n"


def test_kernel_caches_are_kept_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels and the results of autotuning outlive a restart, and in the chart an update, of the server."""
    directories = []

    def build(model: LlamaModel, *, kernels: str, cache_directory: Path) -> HostStepRunner:
        directories.append(cache_directory)
        return HostStepRunner(model)

    monkeypatch.setattr(model_loading, "build_step_runner", build)
    settings = Settings.model_validate({"data_directory": tmp_path, "device": "cpu"})
    model_loading.load_model(settings, load_card("demo"))
    assert directories == [tmp_path / "cuda"]


def test_a_current_database_needs_no_migrations(tmp_path: Path) -> None:
    """Alembic is imported by the start that creates the usage database, and not by later ones."""
    program = (
        "import sys; from pathlib import Path; import llama2_server.usage.ledger; "
        "from llama2_server.usage.local.database import Database; "
        f"imported = 'alembic' in sys.modules; Database.open(Path({str(tmp_path)!r}) / 'usage.db'); "
        "print(imported, 'alembic' in sys.modules)"
    )
    outputs = []
    for _ in range(2):
        call = [sys.executable, "-c", program]
        done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment())
        outputs.append(done.stdout)
    assert outputs == ["False True\n", "False False\n"]


def test_preflight_imports_no_torch() -> None:
    """The checks of stores and files come before the import of torch, which takes seconds."""
    program = "import sys, llama2_server.lifecycle.preflight, llama2_server.__main__; print('torch' in sys.modules)"
    call = [sys.executable, "-c", program]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == "False\n"
