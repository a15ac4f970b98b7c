"""Settings: three sources in order, refusals that name the key, nothing secret shown."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.processes import command, environment

from llama2_client.cli.main import cli
from llama2_server.config.settings import Settings
from llama2_server.config.sources import CLIENT_VARIABLES, BadSettings, ResolvedSettings, read_settings

PASSWORD = "correct-horse"  # noqa: S105
# For each setting two values, neither of them the default, as they are written in a file.
VALUES: Mapping[str, tuple[Any, Any]] = {
    "card": ("one.yaml", "two.yaml"),
    "weights": ("one", "two"),
    "listen": ("127.0.0.1:1", "[::1]:2"),
    "device": ("cpu", "cuda"),
    "cpu_kernels": ("auto", "torch"),
    "dtype": ("float32", "bfloat16"),
    "max_queue_size": (0, 2),
    "queue_timeout_seconds": (1.5, 2.5),
    "shutdown_grace_seconds": (0.0, 2.5),
    "data_directory": ("/one", "/two"),
    "usage_url": ("postgresql://one/db", "postgresql://two/db"),
    "usage_journal_max_bytes": (70000, 80000),
    "redis_url": ("redis://one", "redis://two"),
    "response_cache_ttl_seconds": (1.5, 2.5),
    "response_cache_max_bytes": (1, 2),
    "response_cache_max_entry_bytes": (1, 2),
    "tls_certificate": ("/one", "/two"),
    "tls_key": ("/one", "/two"),
    "tls_client_ca": ("/one", "/two"),
    "health_listen": ("127.0.0.1:11", "127.0.0.1:12"),
    "metrics_listen": ("127.0.0.1:21", "127.0.0.1:22"),
    "otlp_endpoint": ("http://one:4317", "http://two:4317"),
    "log_level": ("debug", "error"),
    "log_format": ("console", "json"),
    "engine_step_timeout_seconds": (1.5, 2.5),
    "readiness_probe_interval_seconds": (1.5, 2.5),
    "max_message_bytes": (1, 2),
    "max_metadata_bytes": (1, 2),
    "max_connections": (1, 2),
    "max_concurrent_streams": (1, 2),
    "max_connection_idle_seconds": (1.5, 2.5),
    "max_connection_age_seconds": (1.5, 2.5),
    "max_connection_age_grace_seconds": (1500.5, 2500.5),
    "keepalive_time_seconds": (1.5, 2.5),
    "keepalive_timeout_seconds": (1.5, 2.5),
    "min_ping_interval_seconds": (1.5, 2.5),
    "handshake_timeout_seconds": (1.5, 2.5),
    "api_keys_file": ("/one", "/two"),
    # These have two values only, one of which is the default: the file says it, and the environment the other.
    "quota_fallback": ("reject", "local"),
    "gpu_kernels": ("auto", "torch"),
    "reflection": (True, False),
    "allow_unauthenticated": (False, True),
}
# What else must be set for a setting to be possible.
NEEDS: Mapping[str, list[str]] = {
    "card": ["--weights", "somewhere"],
    "tls_certificate": ["--tls-key", "key.pem"],
    "tls_key": ["--tls-certificate", "certificate.pem"],
    "tls_client_ca": ["--tls-key", "key.pem", "--tls-certificate", "certificate.pem"],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("LLAMA2_")]:
        monkeypatch.delenv(variable)


def plain(value: Any) -> Any:
    """A value as it was written."""
    if hasattr(value, "get_secret_value"):
        return value.get_secret_value()
    return str(value) if isinstance(value, Path) else value


def refusal(*arguments: str) -> str:
    with pytest.raises(BadSettings) as refused:
        read_settings(arguments)
    return str(refused.value)


def test_every_setting_is_listed_here() -> None:
    """The table above has each setting, but for the file's own name."""
    assert set(VALUES) == set(Settings.model_fields) - {"config"}


@pytest.mark.parametrize("key", VALUES)
def test_flags_win_over_environment_over_file_over_default(
    key: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting can be set in all three places, and says which of them set it."""
    in_file, stronger = VALUES[key]
    variable, flag = f"LLAMA2_{key.upper()}", f"--{key.replace('_', '-')}"
    if isinstance(stronger, bool):
        as_flag = [flag if stronger else flag.replace("--", "--no-")]
    else:
        as_flag = [flag, str(stronger)]

    def read(*arguments: str) -> tuple[Any, str]:
        sourced = read_settings([*arguments, *NEEDS.get(key, [])])
        return plain(getattr(sourced.settings, key)), sourced.sources.get(key, "default")

    assert key not in read_settings([]).sources
    config.write_text(yaml.safe_dump({key: in_file}))
    assert read("--config", str(config)) == (in_file, str(config))
    monkeypatch.setenv("LLAMA2_CONFIG", str(config))
    assert read() == (in_file, str(config))
    monkeypatch.setenv(variable, str(stronger))
    assert read() == (stronger, variable)
    monkeypatch.setenv(variable, str(in_file))
    assert read(*as_flag) == (stronger, flag)


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, as templates leave behind, changes nothing."""
    monkeypatch.setenv("LLAMA2_WEIGHTS", "")
    assert read_settings([]).settings.weights is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lisen", PASSWORD], "--lisen: there is no such flag; did you mean --listen?"),
        (["--max-queue-size"], "--max-queue-size: expected one argument"),
        (["--max-queue-size", "many"], "max_queue_size (--max-queue-size): Input should be a valid integer"),
        (["--device", "tpu"], "device (--device): Input should be 'auto', 'cpu' or 'cuda'"),
        (
            ["--usage-journal-max-bytes", "1"],
            "usage_journal_max_bytes (--usage-journal-max-bytes): Input should be greater",
        ),
        (["--health-listen", "127.0.0.1:50051"], "must be different addresses"),
        (["--listen", "0.0.0.0:1"], "is not loopback and there are no keys"),
        (["--card", "other.yaml"], "weights: this card needs them"),
        (["--config", "/no/such/file"], "config: /no/such/file cannot be read: No such file or directory"),
    ],
)
def test_wrong_flag_is_refused_by_name(arguments: list[str], words: str) -> None:
    """A refusal names the flag and what is allowed, and repeats no value that could be a secret."""
    assert words in refusal(*arguments)
    assert PASSWORD not in refusal(*arguments)


def test_all_problems_come_at_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in the environment, one in the file and a wrong value are three lines of one refusal."""
    config.write_text("maxqueuesize: 3\nshutdown_grace_seconds: soon\n")
    monkeypatch.setenv("LLAMA2_LISTN", "127.0.0.1:1")
    assert refusal("--config", str(config)).splitlines() == [
        "LLAMA2_LISTN: there is no such setting; did you mean LLAMA2_LISTEN?",
        f"maxqueuesize (in {config}): there is no such setting; did you mean max_queue_size?",
        f"shutdown_grace_seconds ({config}): Input should be a valid number, unable to parse string as a number",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "must be a mapping of settings to values"),
        ("config: other.yaml", "a settings file cannot name another"),
        ("listen: 127.0.0.1:1\nlisten: 127.0.0.1:2", "line 2: listen stands twice"),
        (f"max_queue_size: 3\nredis_url: '{PASSWORD}", "line 2: found unexpected end of stream"),
        ("redis_url: [1, 2]", "redis_url"),
    ],
)
def test_bad_file_is_refused_with_the_place(text: str, words: str, config: Path) -> None:
    """What is no settings file is refused with its line, without repeating it."""
    config.write_text(text)
    assert words in refusal("--config", str(config))
    assert PASSWORD not in refusal("--config", str(config))


def test_neighbours_in_the_environment_are_no_typos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's variables, and those that Kubernetes adds for a Service called llama2, are left alone."""
    links = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_ADDR"]
    for variable in [f"LLAMA2_{link}" for link in [*links, "HEADLESS_SERVICE_HOST"]] + sorted(CLIENT_VARIABLES):
        monkeypatch.setenv(variable, "tcp://10.0.0.1:50051")
    assert read_settings([]).sources == {}


def test_client_variables_are_the_clients() -> None:
    """The server knows exactly the variables that the command-line client reads."""
    assert {str(parameter.envvar) for parameter in cli.params if getattr(parameter, "envvar", None)} == CLIENT_VARIABLES


def test_printed_settings_are_yaml_with_sources_and_no_secrets(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `settings` prints can be read as YAML, tells each source, and masks secrets."""
    monkeypatch.setenv("LLAMA2_REDIS_URL", f"redis://:{PASSWORD}@cache")
    config.write_text(f"usage_url: postgresql://u:{PASSWORD}@db/usage\nmax_queue_size: 5\n")
    printed = str(read_settings(["--config", str(config), "--no-reflection"]))
    assert PASSWORD not in printed
    values = yaml.safe_load(printed)
    assert set(values) == set(Settings.model_fields)
    assert (values["max_queue_size"], values["reflection"], values["redis_url"]) == (5, False, "**********")
    sources = {line.split(":")[0]: line.rpartition("# ")[2] for line in printed.splitlines()}
    assert sources["max_queue_size"] == sources["usage_url"] == str(config)
    assert (sources["redis_url"], sources["reflection"]) == ("LLAMA2_REDIS_URL", "--reflection")
    assert sources["device"] == "default"


def test_settings_command_prints_and_ends() -> None:
    """`llama2-server settings` prints what a server with the same flags would run with."""
    call = command("settings", "--max-queue-size", "9")
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, env=environment(), check=True)
    assert done.stdout.rstrip() == str(
        ResolvedSettings(Settings(max_queue_size=9), {"max_queue_size": "--max-queue-size"})
    )
    assert done.stderr == ""


def test_bad_settings_are_refused_before_torch_is_imported() -> None:
    """A refusal comes before the imports that take seconds, with exit code 2."""
    call = command("--max-queue-size", "-1")
    variables = environment(PYTHONPROFILEIMPORTTIME="1")
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, env=variables, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2
    assert "llama2_server.config.settings" in imported
    assert not {"torch", "grpc", "transformers"} & imported


def test_help_names_the_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` lists, besides the flags, what else the command does."""
    with pytest.raises(SystemExit) as end:
        read_settings(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for other in ("settings", "keys new", "usage", "weights fetch"):
        assert f"llama2-server {other} " in shown
