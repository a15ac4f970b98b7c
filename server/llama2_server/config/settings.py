"""Typed settings of the server; `sources` reads their values."""

import ipaddress
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from llama2_server.configuration_error import ConfigurationError

DEMO_CARD = "demo"
ENV_PREFIX = "LLAMA2_"


class Group(StrEnum):
    """Headings that group the settings in `--help` and in docs/settings.md."""

    GENERAL = "General"
    MODEL = "Model"
    NETWORK = "Network"
    TLS = "TLS"
    ACCOUNTS = "Accounts and quotas"
    USAGE = "Usage records"
    CACHE = "Response cache"
    RECEIPTS = "Receipts"
    IDEMPOTENCY = "Idempotency"
    TELEMETRY = "Telemetry"
    QUEUE = "Queue and timeouts"
    CONNECTIONS = "Connection limits"


def _host_and_port(listen: str | None) -> str | None:
    if listen is None:
        return None
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051; port 0 selects a free port")
    return listen


def default_data_directory() -> Path:
    """Return the directory for a service's state by the XDG rules.

    Raises:
        ConfigurationError: the account of this process has no home directory, as in some containers.
    """
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "llama2-grpc"
    except RuntimeError:
        raise ConfigurationError(
            f"--data-directory: has no default, because HOME is not set and uid {os.getuid()} has no home directory; "
            "pass a directory, or set HOME"
        ) from None


class Settings(BaseSettings):
    """Settings that the operator decides; the model card defines what the service promises.

    The docstring of a setting is its documentation. `--help` prints the first sentence, docs/settings.md all of it.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    config: Annotated[Path | None, Group.GENERAL] = None
    """YAML settings file; the environment and flags override it. Its keys are the names of the settings."""
    data_directory: Annotated[Path, Group.GENERAL, Field(default_factory=default_data_directory)]
    """Directory of the usage ledger and startup caches, on a local disk. The caches make later starts faster."""

    card: Annotated[str, Group.MODEL] = DEMO_CARD
    """Model card: demo, llama-2-7b-chat-fp16, or a card file."""
    weights: Annotated[str | None, Group.MODEL] = None
    """Hugging Face Llama checkpoint: a directory, a Hub id, or demo.
    An example of a Hub id is meta-llama/Llama-2-7b-chat-hf. The value demo selects the weights of the demo model, which
    any card accepts; it is the default of the demo card."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Group.MODEL] = "auto"
    """Device that runs the model; auto selects CUDA if it is available."""
    dtype: Annotated[Literal["float16", "bfloat16", "float32"] | None, Group.MODEL] = None
    """Precision of the model, instead of the card's precision."""
    max_position_embeddings: Annotated[PositiveInt | None, Group.MODEL] = None
    """Context of the model in tokens, instead of the checkpoint's value.
    Some checkpoints of Llama-2 state 2048, although the model was trained with 4096."""
    allow_other_chat_template: Annotated[bool, Group.MODEL] = False
    """Accept a checkpoint with a chat template other than Llama-2's.
    The server still uses Llama-2's template, and logs a warning. Prompts with `raw` use no template."""
    cpu_kernels: Annotated[Literal["auto", "portable", "amx", "torch"], Group.MODEL] = "auto"
    """CPU kernels for float16: native code if available (auto), or torch.
    Native code has two families: amx for processors with Intel AMX, and portable for all others. auto selects amx for
    models from 32 MiB on if the processor supports it, otherwise portable. Texts can differ between the families, and
    the fingerprint names the family: if replicas with equal texts run on different processors, select portable."""
    cpu_weight_bits: Annotated[Literal["auto", "12", "16"], Group.MODEL] = "auto"
    """Bits per weight on a CPU; 12 only where this is exact.
    auto selects the faster one for the processor and the slots; replies are the same. Weights that were converted from
    bfloat16, as Llama-2's were, fit in 12 bits and take a quarter less memory; others stay at 16 bits."""
    threads: Annotated[PositiveInt | None, Group.MODEL] = None
    """Number of CPU threads of the model, one per core by default.
    Physical cores count, and the affinity and the CPU quota of the process limit them. By default, a model below 32 MiB
    has one thread, because that is faster."""
    prompt_lookup: Annotated[bool, Group.MODEL] = True
    """Guess tokens from repeated text and check several in one step.
    Replies are the same, but those that quote or edit their prompt are faster. Only the native CPU step does it."""
    max_mixed_step_seconds: Annotated[PositiveFloat, Group.MODEL] = 0.1
    """Target time of a CPU step that reads a prompt while others generate.
    A longer time shortens the prompt's first token and lengthens the pauses of the others. In seconds."""
    gpu_kernels: Annotated[Literal["auto", "fused", "torch"], Group.MODEL] = "auto"
    """GPU kernels: Triton, compiled and tuned at startup (auto), or torch.
    fused has fewer kernels, which overlap; they were only tested one by one."""

    require_stores: Annotated[bool, Group.USAGE] = False
    """Refuse to start while Redis or the usage database does not answer.
    By default, the server starts with a warning. A store that rejects the connection always stops the start."""

    listen: Annotated[str, Group.NETWORK, AfterValidator(_host_and_port)] = "127.0.0.1:50051"
    """Address that serves gRPC; port 0 selects a free port."""
    health_listen: Annotated[str | None, Group.NETWORK, AfterValidator(_host_and_port)] = None
    """Plaintext address that serves only health checks. It is for probes that do not support TLS."""
    reflection: Annotated[bool, Group.NETWORK] = True
    """gRPC reflection, which grpcurl and buf curl use."""

    tls_certificate: Annotated[Path | None, Group.TLS] = None
    """Certificate chain of the server, a PEM file. With a certificate and its key, the port accepts only TLS."""
    tls_key: Annotated[Path | None, Group.TLS] = None
    """Private key of the certificate, a PEM file."""
    tls_client_ca: Annotated[Path | None, Group.TLS] = None
    """Certificate authorities for client certificates, a PEM file.
    Every client must present a certificate from one of these authorities (mutual TLS)."""

    api_keys_file: Annotated[Path | None, Group.ACCOUNTS] = None
    """File of API keys and their accounts; changes apply without restart.
    `llama2-server keys` edits this file."""
    allow_unauthenticated: Annotated[bool, Group.ACCOUNTS] = False
    """Access without API keys on an address other than loopback.
    Every client that reaches the address can send requests."""
    max_free_calls_per_minute: Annotated[PositiveInt, Group.ACCOUNTS] = 600
    """Maximum calls per minute and account that generate nothing.
    They are CountTokens, GetUsage, GetModelCard and invalid requests. Each replica counts them by itself."""
    max_keyless_calls_per_minute: Annotated[PositiveInt, Group.ACCOUNTS] = 600
    """Maximum calls per minute without a valid API key, of all clients.
    Further ones get RESOURCE_EXHAUSTED. Calls with a valid key, health and reflection are not counted."""
    redis_url: Annotated[SecretStr | None, Group.ACCOUNTS] = None
    """Redis for quotas and cached responses that all replicas share.
    The format is redis://[:PASSWORD@]HOST[:PORT][/DB]."""
    quota_fallback: Annotated[Literal["reject", "local"], Group.ACCOUNTS] = "reject"
    """Behavior during a Redis outage: reject requests, or count locally.
    With local, each replica counts the quotas by itself."""

    usage_url: Annotated[SecretStr | None, Group.USAGE] = None
    """Usage database: postgresql://USER:PASSWORD@HOST/DB, or else a file.
    The file is usage.db in the data directory."""
    usage_max_pending_records: Annotated[PositiveInt, Group.USAGE] = 100_000
    """Maximum number of usage records that wait for the usage database.
    They wait in the data directory while the database is unavailable. Beyond the limit, requests are rejected."""

    response_cache_ttl_seconds: Annotated[PositiveFloat, Group.CACHE] = 3600.0
    """Lifetime of a cached response, in seconds."""
    response_cache_max_bytes: Annotated[PositiveInt, Group.CACHE] = 64 * 1024 * 1024
    """Maximum size of the response cache in memory, in bytes."""
    response_cache_max_entry_bytes: Annotated[PositiveInt, Group.CACHE] = 256 * 1024
    """Maximum size of a response that is cached in Redis, in bytes."""
    coalesce_across_replicas: Annotated[bool, Group.CACHE] = False
    """Share generations between replicas, through Redis.
    The text of a reply in progress is then in Redis, until two seconds after its end."""

    receipt_key: Annotated[Path | None, Group.RECEIPTS] = None
    """Private key that signs receipts; none by default.
    `llama2-server receipts keygen` makes it. All replicas share one key."""
    receipt_public_keys: Annotated[Path | None, Group.RECEIPTS] = None
    """Directory of earlier public keys (*.pub).
    GetModelCard lists them, so that old receipts stay valid. The public key of --receipt-key is listed in any case."""
    idempotency_retention_seconds: Annotated[PositiveFloat, Group.IDEMPOTENCY] = 24 * 3600.0
    """Time for which an idempotency key is stored, in seconds. Then it names a new call."""
    idempotency_fallback: Annotated[Literal["reject", "local"], Group.IDEMPOTENCY] = "local"
    """Behavior of calls with a key while PostgreSQL does not answer.
    With local, their keys hold only on this replica; with reject, the calls are rejected."""
    resume_window_seconds: Annotated[NonNegativeFloat, Group.IDEMPOTENCY] = 30.0
    """Time for which a broken stream continues, in seconds.
    Only streams with an idempotency key continue, as long as no other request waits for a slot. Then a client that
    comes back misses nothing and waits for nothing."""

    metrics_listen: Annotated[str | None, Group.TELEMETRY, AfterValidator(_host_and_port)] = None
    """Address of the Prometheus metrics, HTTP; no metrics by default. Prometheus scrapes the path /metrics."""
    otlp_endpoint: Annotated[str | None, Group.TELEMETRY] = None
    """OTLP/gRPC endpoint for traces, such as http://localhost:4317. Without an endpoint, tracing is off."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Group.TELEMETRY] = "info"
    """Minimum log level."""
    log_format: Annotated[Literal["auto", "console", "json"], Group.TELEMETRY] = "auto"
    """Log format; auto is console on a terminal and json elsewhere."""

    max_queue_size: Annotated[NonNegativeInt, Group.QUEUE] = 64
    """Maximum number of queued requests."""
    queue_timeout_seconds: Annotated[PositiveFloat, Group.QUEUE] = 300.0
    """Maximum time that a request waits for a slot, in seconds."""
    engine_step_timeout_seconds: Annotated[PositiveFloat, Group.QUEUE] = 120.0
    """Maximum duration of an engine step, in seconds.
    After a longer step the engine counts as hung: the process exits and must be restarted."""
    readiness_probe_interval_seconds: Annotated[PositiveFloat, Group.QUEUE] = 300.0
    """Time without a successful request before a probe, in seconds.
    The probe generates a token to check that the server still works."""
    shutdown_grace_seconds: Annotated[NonNegativeFloat, Group.QUEUE] = 30.0
    """Time for running requests after SIGTERM or Ctrl-C, in seconds."""

    max_message_bytes: Annotated[PositiveInt | None, Group.CONNECTIONS] = None
    """Maximum size of a request message, in bytes.
    The default is twice the longest text that fits into the card's context, with its messages and parameters."""
    max_metadata_bytes: Annotated[PositiveInt, Group.CONNECTIONS] = 16 * 1024
    """Maximum size of the metadata of a request, in bytes."""
    max_connections: Annotated[PositiveInt, Group.CONNECTIONS] = 200
    """Maximum number of open connections. Further connections are closed immediately."""
    max_concurrent_streams: Annotated[PositiveInt | None, Group.CONNECTIONS] = None
    """Maximum number of concurrent requests on one connection.
    The default is the number of slots plus the queue size, and at least 100."""
    max_keyless_calls: Annotated[PositiveInt, Group.CONNECTIONS] = 256
    """Maximum number of open calls without a valid API key, on each port.
    Beyond it, each connection still has one. Health checks, health watches, reflection and the card need no key."""
    max_connection_idle_seconds: Annotated[PositiveFloat, Group.CONNECTIONS] = 20.0
    """Time without requests before a connection is closed, in seconds."""
    max_connection_age_seconds: Annotated[PositiveFloat, Group.CONNECTIONS] = 1800.0
    """Age at which a client is asked to reconnect, in seconds. Clients then find new replicas."""
    max_connection_age_grace_seconds: Annotated[PositiveFloat, Group.CONNECTIONS] = 3600.0
    """Time for running requests on a connection of that age, in seconds.
    It must be longer than the queue timeout."""
    keepalive_time_seconds: Annotated[PositiveFloat, Group.CONNECTIONS] = 60.0
    """Time without traffic before a connection is pinged, in seconds."""
    keepalive_timeout_seconds: Annotated[PositiveFloat, Group.CONNECTIONS] = 20.0
    """Maximum time to answer a ping, in seconds. A connection without an answer is closed."""
    min_ping_interval_seconds: Annotated[PositiveFloat, Group.CONNECTIONS] = 10.0
    """Minimum time between the pings of a client, in seconds. A client that pings more often is disconnected."""
    handshake_timeout_seconds: Annotated[PositiveFloat, Group.CONNECTIONS] = 5.0
    """Timeout of the handshake of a new connection, in seconds. The handshake includes TLS."""

    # Messages name settings by their flags; `sources` replaces a flag by the variable or key that the operator used.
    @model_validator(mode="after")
    def _check_addresses(self) -> "Settings":
        if self.api_keys_file is None and not self.allow_unauthenticated and not is_loopback(self.listen):
            raise ValueError(
                f"--listen: {self.listen} is not a loopback address and there are no API keys, so every client that "
                "reaches it could send requests; pass --api-keys-file, listen on 127.0.0.1, "
                "or pass --allow-unauthenticated"
            )
        addresses = [listen for listen in (self.listen, self.health_listen, self.metrics_listen) if listen is not None]
        fixed = [address for address in addresses if not address.endswith(":0")]
        if len(set(fixed)) < len(fixed):
            raise ValueError("--listen, --health-listen and --metrics-listen: must be different addresses")
        return self

    @model_validator(mode="after")
    def _check_connections(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "--tls-key" if self.tls_key is None else "--tls-certificate"
            raise ValueError(f"{missing}: missing; TLS needs both --tls-certificate and --tls-key")
        if self.coalesce_across_replicas and self.redis_url is None:
            raise ValueError("--coalesce-across-replicas: needs --redis-url, through which replicas share generations")
        if self.receipt_public_keys is not None and self.receipt_key is None:
            raise ValueError("--receipt-public-keys: needs --receipt-key, which signs the receipts")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca: mutual TLS also needs --tls-certificate and --tls-key")
        if self.max_connection_age_grace_seconds <= self.queue_timeout_seconds:
            raise ValueError(
                f"--max-connection-age-grace-seconds: must be more than --queue-timeout-seconds "
                f"({self.queue_timeout_seconds:g}), or requests that waited in the queue would be cut off"
            )
        return self


def group_of(key: str) -> Group:
    """Return the group of a setting."""
    return next(item for item in Settings.model_fields[key].metadata if isinstance(item, Group))


def description_of(key: str) -> str:
    """Return the description of a setting on one line."""
    return " ".join((Settings.model_fields[key].description or "").split())


def default_of(key: str) -> str:
    """Return the default of a setting as text, or an empty string if it has none."""
    field = Settings.model_fields[key]
    if field.default_factory is not None:
        return "~/.local/state/llama2-grpc"  # the same text for each user
    if field.default is None:
        return ""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def is_loopback(listen: str) -> bool:
    """Return whether only this machine can reach the address."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
