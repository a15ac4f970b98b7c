"""The server's settings, typed; where their values come from stands in settings_sources.py."""

import ipaddress
import os
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

DEMO_CARD = "demo"
ENV_PREFIX = "LLAMA2_"
# A journal that holds less than a few records could never take one.
MIN_JOURNAL_BYTES = 64 * 1024


HELP = """\
Serve one model over gRPC. Each flag is also a key of the --config file and a variable: LLAMA2_LISTEN is --listen.

Besides:
  llama2-server settings …                   print the settings in force, and where each comes from
  llama2-server keys new ACCOUNT …           make an API key
  llama2-server usage …                      print what accounts have used
  llama2-server weights fetch HUB_ID --to …  fetch a checkpoint from the Hugging Face Hub"""


def _host_and_port(listen: str | None) -> str | None:
    if listen is None:
        return None
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051; port 0 takes a free one")
    return listen


def default_data_directory() -> Path:
    """Where a service keeps its state by the XDG rules."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "llama2-grpc"


class Settings(BaseSettings):
    """Everything that the operator decides; what the service promises stands in the card."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        cli_exit_on_error=False,
        cli_prog_name="llama2-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="forbid",
        frozen=True,
        json_schema_extra={"description": HELP},  # what --help begins with
    )

    config: Annotated[
        Path | None,
        Field(description="A YAML file of settings, by the names in this list; the environment and flags win over it."),
    ] = None
    card: Annotated[
        str, Field(description="A model card: a shipped one's name (demo, llama-2-7b-chat-fp16) or a file.")
    ] = DEMO_CARD
    weights: Annotated[
        str | None,
        Field(
            description="A Hugging Face Llama checkpoint: a directory, or a Hub id such as "
            "meta-llama/Llama-2-7b-chat-hf. The demo card brings its own."
        ),
    ] = None
    listen: Annotated[
        str, AfterValidator(_host_and_port), Field(description="Where to listen: HOST:PORT; port 0 takes a free one.")
    ] = "127.0.0.1:50051"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="Where the model runs; auto is CUDA when there is one.")
    ] = "auto"
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None, Field(description="Precision, instead of the card's.")
    ] = None
    cpu_kernels: Annotated[
        Literal["auto", "torch"],
        Field(description="What decodes float16 on a CPU: the native step where there is one (auto), or torch."),
    ] = "auto"
    gpu_kernels: Annotated[
        Literal["auto", "torch"],
        Field(description="What decodes on a GPU: Triton kernels, compiled and tuned at start (auto), or plain torch."),
    ] = "auto"
    max_queue_size: Annotated[NonNegativeInt, Field(description="The most calls that may wait for a slot.")] = 64
    queue_timeout_seconds: Annotated[
        PositiveFloat, Field(description="The longest that a call may wait for a slot.")
    ] = 300.0
    shutdown_grace_seconds: Annotated[
        NonNegativeFloat, Field(description="How long calls that run may go on after SIGTERM or Ctrl-C.")
    ] = 30.0
    data_directory: Annotated[
        Path,
        Field(
            description="Where the usage ledger and its journal are, and what makes later starts quicker.",
            default_factory=default_data_directory,
        ),
    ]
    usage_url: Annotated[
        SecretStr | None,
        Field(description="The ledger's store: postgresql://USER:PASSWORD@HOST/DB; else a file in the data directory."),
    ] = None
    usage_journal_max_bytes: Annotated[
        int,
        Field(
            ge=MIN_JOURNAL_BYTES,
            description="What may wait on the disk for a ledger store that is down; then work is refused.",
        ),
    ] = 16 * 1024 * 1024
    redis_url: Annotated[
        SecretStr | None,
        Field(description="Counts quotas and keeps responses for all replicas: redis://[:PASSWORD@]HOST[:PORT][/DB]."),
    ] = None
    quota_fallback: Annotated[
        Literal["reject", "local"],
        Field(description="While Redis is unavailable: reject requests, or count quotas per replica (local)."),
    ] = "reject"
    response_cache_ttl_seconds: Annotated[
        PositiveFloat, Field(description="How long a response is kept in the cache.")
    ] = 3600.0
    response_cache_max_bytes: Annotated[
        PositiveInt, Field(description="The most that the response cache may take in memory.")
    ] = 64 * 1024 * 1024
    response_cache_max_entry_bytes: Annotated[
        PositiveInt, Field(description="The largest response that is kept in Redis.")
    ] = 256 * 1024
    tls_certificate: Annotated[
        Path | None,
        Field(description="The server's certificate chain, PEM; with it and the key the port speaks TLS only."),
    ] = None
    tls_key: Annotated[Path | None, Field(description="The private key of the certificate, PEM.")] = None
    tls_client_ca: Annotated[
        Path | None,
        Field(description="Certificate authorities, PEM: every client must show a certificate of theirs (mutual TLS)."),
    ] = None
    health_listen: Annotated[
        str | None,
        AfterValidator(_host_and_port),
        Field(description="A second, plaintext port that serves health only: for probes, which speak no TLS."),
    ] = None
    metrics_listen: Annotated[
        str | None,
        AfterValidator(_host_and_port),
        Field(description="Where Prometheus scrapes /metrics over HTTP; without it there are no metrics."),
    ] = None
    otlp_endpoint: Annotated[
        str | None,
        Field(description="Where traces go: OTLP over gRPC, such as http://localhost:4317; without it there are none."),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="The least that is logged.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"],
        Field(description="Log lines for people or for machines; auto is console on a terminal, else json."),
    ] = "auto"
    engine_step_timeout_seconds: Annotated[
        PositiveFloat,
        Field(description="A step of the engine that takes longer has hung: the process ends, to be restarted."),
    ] = 120.0
    readiness_probe_interval_seconds: Annotated[
        PositiveFloat,
        Field(description="A server on which nothing succeeded for so long generates a token, to know that it can."),
    ] = 300.0
    max_message_bytes: Annotated[PositiveInt, Field(description="The largest request message.")] = 1024 * 1024
    max_metadata_bytes: Annotated[PositiveInt, Field(description="The most metadata that a call may bring.")] = (
        16 * 1024
    )
    max_connections: Annotated[PositiveInt, Field(description="Connections at once; more are closed as they come.")] = (
        1000
    )
    max_concurrent_streams: Annotated[
        PositiveInt | None,
        Field(description="Calls at once on one connection; by default all that fit slots and line, and 100 more."),
    ] = None
    max_connection_idle_seconds: Annotated[
        PositiveFloat, Field(description="A connection without calls is closed after so long.")
    ] = 900.0
    max_connection_age_seconds: Annotated[
        PositiveFloat,
        Field(description="A connection is asked to end after so long, so that clients look for new replicas."),
    ] = 1800.0
    max_connection_age_grace_seconds: Annotated[
        PositiveFloat,
        Field(description="What calls on a connection that was asked to end may still take."),
    ] = 3600.0
    keepalive_time_seconds: Annotated[
        PositiveFloat, Field(description="A silent connection is pinged after so long.")
    ] = 60.0
    keepalive_timeout_seconds: Annotated[
        PositiveFloat, Field(description="A ping that is not answered for so long ends the connection.")
    ] = 20.0
    min_ping_interval_seconds: Annotated[
        PositiveFloat, Field(description="A peer that pings more often than this is sent away.")
    ] = 10.0
    handshake_timeout_seconds: Annotated[
        PositiveFloat, Field(description="What a peer has for the handshake of a new connection, TLS included.")
    ] = 10.0
    reflection: Annotated[bool, Field(description="Serve reflection, which grpcurl and buf curl ask for.")] = True
    api_keys_file: Annotated[
        Path | None,
        Field(
            description="API keys and their accounts, as `llama2-server keys new` prints them; read anew on changes."
        ),
    ] = None
    allow_unauthenticated: Annotated[
        bool,
        Field(description="Serve without keys on an address other than loopback: anybody who reaches it may call."),
    ] = False

    @model_validator(mode="after")
    def _possible(self) -> "Settings":
        if self.weights is None and self.card != DEMO_CARD:
            raise ValueError(
                "weights: this card needs them; give a checkpoint directory or a Hub id, "
                "such as --weights meta-llama/Llama-2-7b-chat-hf"
            )
        if self.api_keys_file is None and not self.allow_unauthenticated and not is_loopback(self.listen):
            raise ValueError(
                f"listen: {self.listen} is not loopback and there are no keys: anybody who reaches it could call; "
                "give a --api-keys-file, listen on 127.0.0.1, or say --allow-unauthenticated"
            )
        ports = [listen for listen in (self.listen, self.health_listen, self.metrics_listen) if listen is not None]
        taken = [listen for listen in ports if not listen.endswith(":0")]
        if len(set(taken)) < len(taken):
            raise ValueError("listen, health_listen and metrics_listen must be different addresses")
        return self

    @model_validator(mode="after")
    def _possible_on_the_wire(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ValueError(f"{missing}: TLS needs both tls_certificate and tls_key")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: mutual TLS needs tls_certificate and tls_key as well")
        if self.max_connection_age_grace_seconds <= self.queue_timeout_seconds:
            raise ValueError(
                f"max_connection_age_grace_seconds: must be more than queue_timeout_seconds "
                f"({self.queue_timeout_seconds:g}): calls would be cut off that have waited for their turn"
            )
        return self


def is_loopback(listen: str) -> bool:
    """Whether only this machine can reach the address."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
