"""Settings: the order of the sources, errors that name the setting, and masked secrets."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_client.cli.main import cli
from llama2_server.cli.settings import settings as settings_command
from llama2_server.config.settings import Settings
from llama2_server.config.sources import CLIENT_VARIABLES, ResolvedSettings, SettingsError, read_settings

PASSWORD = "correct-horse"  # noqa: S105
# Two values for each setting, as in a settings file. Neither is the default.
VALUES: Mapping[str, tuple[Any, Any]] = {
    "card": ("one.yaml", "two.yaml"),
    "weights": ("one", "two"),
    "require_stores": (False, True),
    "listen": ("127.0.0.1:1", "[::1]:2"),
    "device": ("cpu", "cuda"),
    "cpu_kernels": ("portable", "amx"),
    "cpu_weight_bits": ("12", "16"),
    "threads": (1, 2),
    "max_position_embeddings": (4096, 8192),
    "dtype": ("float32", "bfloat16"),
    "max_queue_size": (0, 2),
    "queue_timeout_seconds": (1.5, 2.5),
    "max_mixed_step_seconds": (0.2, 0.3),
    "shutdown_grace_seconds": (0.0, 2.5),
    "data_directory": ("/one", "/two"),
    "usage_url": ("postgresql://one/db", "postgresql://two/db"),
    "usage_max_pending_records": (70000, 80000),
    "redis_url": ("redis://one", "redis://two"),
    "response_cache_ttl_seconds": (1.5, 2.5),
    "response_cache_max_bytes": (1, 2),
    "response_cache_max_entry_bytes": (1, 2),
    "idempotency_retention_seconds": (3600.0, 7200.0),
    "resume_window_seconds": (10.0, 0.0),
    "max_free_calls_per_minute": (100, 200),
    "max_keyless_calls_per_minute": (100, 200),
    "tls_certificate": ("/one", "/two"),
    "tls_key": ("/one", "/two"),
    "tls_client_ca": ("/one", "/two"),
    "receipt_key": ("/one", "/two"),
    "receipt_public_keys": ("/one", "/two"),
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
    "max_keyless_calls": (1, 2),
    "max_connection_idle_seconds": (1.5, 2.5),
    "max_connection_age_seconds": (1.5, 2.5),
    "max_connection_age_grace_seconds": (1500.5, 2500.5),
    "keepalive_time_seconds": (1.5, 2.5),
    "keepalive_timeout_seconds": (1.5, 2.5),
    "min_ping_interval_seconds": (1.5, 2.5),
    "handshake_timeout_seconds": (1.5, 2.5),
    "api_keys_file": ("/one", "/two"),
    # These settings have only two values: the file has the default, and the environment the other value.
    "quota_fallback": ("reject", "local"),
    "idempotency_fallback": ("local", "reject"),
    "gpu_kernels": ("auto", "fused"),
    "prompt_lookup": (True, False),
    "reflection": (True, False),
    "coalesce_across_replicas": (False, True),
    "allow_unauthenticated": (False, True),
    "allow_other_chat_template": (False, True),
}
# Other flags that a setting requires.
NEEDS: Mapping[str, list[str]] = {
    "card": ["--weights", "somewhere"],
    "tls_certificate": ["--tls-key", "key.pem"],
    "tls_key": ["--tls-certificate", "certificate.pem"],
    "receipt_public_keys": ["--receipt-key", "receipts.key"],
    "coalesce_across_replicas": ["--redis-url", "redis://127.0.0.1"],
    "tls_client_ca": ["--tls-key", "key.pem", "--tls-certificate", "certificate.pem"],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("LLAMA2_")]:
        monkeypatch.delenv(variable)


def plain(value: Any) -> Any:
    """Return a value as a settings file has it."""
    if hasattr(value, "get_secret_value"):
        return value.get_secret_value()
    return str(value) if isinstance(value, Path) else value


def read(*arguments: str) -> ResolvedSettings:
    """Return the settings of a command line."""
    with settings_command.make_context("settings", list(arguments)) as context:
        return read_settings(context.params)


def error_of(*arguments: str) -> str:
    """Return the error message of a command line."""
    with pytest.raises(SettingsError) as error:
        read(*arguments)
    return str(error.value)


def test_table_has_every_setting() -> None:
    """The table above has every setting except the name of the settings file."""
    assert set(VALUES) == set(Settings.model_fields) - {"config"}


@pytest.mark.parametrize("key", VALUES)
def test_flags_override_environment_overrides_file_overrides_default(
    key: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting can come from each of the three sources, and the result names the source."""
    in_file, override = VALUES[key]
    variable, flag = f"LLAMA2_{key.upper()}", f"--{key.replace('_', '-')}"
    if isinstance(override, bool):
        as_flag = [flag if override else flag.replace("--", "--no-")]
    else:
        as_flag = [flag, str(override)]

    def value_and_source(*arguments: str) -> tuple[Any, str]:
        resolved = read(*arguments, *NEEDS.get(key, []))
        return plain(getattr(resolved.settings, key)), resolved.sources.get(key, "default")

    assert key not in read().sources
    config.write_text(yaml.safe_dump({key: in_file}))
    assert value_and_source("--config", str(config)) == (in_file, str(config))
    monkeypatch.setenv("LLAMA2_CONFIG", str(config))
    assert value_and_source() == (in_file, str(config))
    monkeypatch.setenv(variable, str(override))
    assert value_and_source() == (override, variable)
    monkeypatch.setenv(variable, str(in_file))
    assert value_and_source(*as_flag) == (override, flag)


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, which templates often produce, has no effect."""
    monkeypatch.setenv("LLAMA2_WEIGHTS", "")
    assert read().settings.weights is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-queue-size", "many"], "--max-queue-size: must be a whole number"),
        (["--queue-timeout-seconds", "soon"], "--queue-timeout-seconds: must be a number"),
        (["--queue-timeout-seconds", "0"], "--queue-timeout-seconds: must be greater than 0"),
        (["--device", "tpu"], "--device: must be 'auto', 'cpu' or 'cuda'"),
        (["--usage-max-pending-records", "0"], "--usage-max-pending-records: must be greater than 0"),
        (["--listen", "here"], "--listen: must be HOST:PORT, such as 127.0.0.1:50051"),
        (["--health-listen", "127.0.0.1:50051"], "must be different addresses"),
        (["--listen", "0.0.0.0:1"], "--listen: 0.0.0.0:1 is not a loopback address and there are no API keys"),
        (["--tls-key", "key.pem"], "--tls-certificate: missing; TLS needs both --tls-certificate and --tls-key"),
        (["--tls-client-ca", "ca.pem"], "--tls-client-ca: mutual TLS also needs --tls-certificate and --tls-key"),
        (["--config", "/no/such/file"], "--config: cannot read /no/such/file: No such file or directory"),
    ],
)
def test_wrong_value_is_named(arguments: list[str], message: str) -> None:
    """The error names the flag and the allowed values."""
    assert message in error_of(*arguments)


def test_error_names_the_source_of_each_setting(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule for several settings names each of them as the operator set it."""
    config.write_text("max_connection_age_grace_seconds: 1\n")
    monkeypatch.setenv("LLAMA2_QUEUE_TIMEOUT_SECONDS", "2")
    message = error_of("--config", str(config))
    assert message.startswith(
        f"max_connection_age_grace_seconds in {config}: must be more than LLAMA2_QUEUE_TIMEOUT_SECONDS (2), "
    )


def test_messages_of_other_parts_name_the_source(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`name_sources` replaces flags of settings that have another source, and no other words."""
    config.write_text("weights: somewhere\n")
    monkeypatch.setenv("LLAMA2_REDIS_URL", "redis://cache")
    resolved = read("--config", str(config), "--listen", "127.0.0.1:1")
    message = "--weights: /models/org--weights is bad; see --redis-url, --listen, --dtype and --to"
    assert resolved.name_sources(message) == (
        f"weights in {config}: /models/org--weights is bad; see LLAMA2_REDIS_URL, --listen, --dtype and --to"
    )


def test_all_errors_are_reported_together(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable, a misspelt key and a wrong value are three lines of one error."""
    config.write_text("maxqueuesize: 3\nshutdown_grace_seconds: soon\n")
    monkeypatch.setenv("LLAMA2_LISTN", "127.0.0.1:1")
    monkeypatch.setenv("LLAMA2_MAX_CONNECTIONS", "few")
    assert error_of("--config", str(config)).splitlines() == [
        "LLAMA2_LISTN: no such setting; did you mean LLAMA2_LISTEN?",
        f"maxqueuesize in {config}: no such setting; did you mean max_queue_size?",
        f"shutdown_grace_seconds in {config}: must be a number",
        "LLAMA2_MAX_CONNECTIONS: must be a whole number",
    ]


def test_suggestion_ignores_the_prefix_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that resembles no setting gets no suggestion, although all variables have the same prefix."""
    monkeypatch.setenv("LLAMA2_ZZZ", "1")
    assert error_of() == "LLAMA2_ZZZ: no such setting"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "must map settings to values"),
        ("config: other.yaml", "a settings file cannot name another one"),
        ("[" * 500, "not YAML"),
        ("listen: 127.0.0.1:1\nlisten: 127.0.0.1:2", "line 2: duplicate key listen"),
        (f"max_queue_size: 3\nredis_url: '{PASSWORD}", "line 2: found unexpected end of stream"),
        (f"redis_url: [{PASSWORD}, 2]", "redis_url in "),
        (f"max_queue_size: {PASSWORD}", "max_queue_size in "),
    ],
)
def test_invalid_file_is_rejected_with_the_line(text: str, words: str, config: Path) -> None:
    """The error has a line number or the key, but not the text of the file, which may be a secret."""
    config.write_text(text)
    assert words in error_of("--config", str(config))
    assert PASSWORD not in error_of("--config", str(config))


def test_coalescing_across_replicas_needs_redis() -> None:
    """The error names the missing flag."""
    assert "--coalesce-across-replicas: needs --redis-url" in error_of("--coalesce-across-replicas")


def test_variables_of_other_programs_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's variables and the variables that Kubernetes adds for a Service named llama2 are not settings."""
    links = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_ADDR"]
    for variable in [f"LLAMA2_{link}" for link in [*links, "HEADLESS_SERVICE_HOST"]] + sorted(CLIENT_VARIABLES):
        monkeypatch.setenv(variable, "tcp://10.0.0.1:50051")
    assert read().sources == {}


def test_client_variables_are_complete() -> None:
    """The list has exactly the variables that the command-line client reads."""
    assert {str(parameter.envvar) for parameter in cli.params if getattr(parameter, "envvar", None)} == CLIENT_VARIABLES


def test_printed_settings_are_yaml_with_sources_and_no_secrets(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of `settings` is YAML, has the source of each value, and masks secrets."""
    monkeypatch.setenv("LLAMA2_REDIS_URL", f"redis://:{PASSWORD}@cache")
    config.write_text(f"usage_url: postgresql://u:{PASSWORD}@db/usage\nmax_queue_size: 5\n")
    printed = str(read("--config", str(config), "--no-reflection"))
    assert PASSWORD not in printed
    values = yaml.safe_load(printed)
    assert set(values) == set(Settings.model_fields)
    assert (values["max_queue_size"], values["reflection"], values["redis_url"]) == (5, False, "**********")
    sources = {line.split(":")[0]: line.rpartition("# ")[2] for line in printed.splitlines()}
    assert sources["max_queue_size"] == sources["usage_url"] == str(config)
    assert (sources["redis_url"], sources["reflection"]) == ("LLAMA2_REDIS_URL", "--reflection")
    assert sources["device"] == "default"
