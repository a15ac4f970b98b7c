"""The server's settings, typed: flags win over `LLAMA2_…` in the environment, which wins over the defaults."""

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


def _host_and_port(listen: str) -> str:
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
        env_prefix="LLAMA2_",
        cli_prog_name="llama2-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="forbid",
        frozen=True,
    )

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
    line_limit: Annotated[NonNegativeInt, Field(description="The most calls that may wait for a slot.")] = 64
    queue_timeout_seconds: Annotated[
        PositiveFloat, Field(description="The longest that a call may wait for a slot.")
    ] = 300.0
    grace_seconds: Annotated[
        NonNegativeFloat, Field(description="How long calls that run may go on after SIGTERM or Ctrl-C.")
    ] = 30.0
    data_directory: Annotated[
        Path,
        Field(description="Where the usage ledger and its journal are kept.", default_factory=default_data_directory),
    ]
    ledger_url: Annotated[
        SecretStr | None,
        Field(description="The ledger's store: postgresql://USER:PASSWORD@HOST/DB; else a file in the data directory."),
    ] = None
    journal_max_bytes: Annotated[
        PositiveInt,
        Field(description="What may wait on the disk for a ledger store that is down; then work is refused."),
    ] = 16 * 1024 * 1024
    redis_url: Annotated[
        SecretStr | None,
        Field(description="Counts quotas and keeps responses for all replicas: redis://[:PASSWORD@]HOST[:PORT][/DB]."),
    ] = None
    when_quota_store_down: Annotated[
        Literal["refuse", "local"],
        Field(description="While Redis is gone: refuse requests, or hold the quotas per replica."),
    ] = "refuse"
    cache_ttl_seconds: Annotated[PositiveFloat, Field(description="How long a response is kept in the cache.")] = 3600.0
    cache_max_bytes: Annotated[
        PositiveInt, Field(description="The most that the response cache may take in memory.")
    ] = 64 * 1024 * 1024
    cache_max_entry_bytes: Annotated[PositiveInt, Field(description="The largest response that is kept in Redis.")] = (
        256 * 1024
    )
    max_message_bytes: Annotated[PositiveInt, Field(description="The largest request message.")] = 1024 * 1024
    reflection: Annotated[bool, Field(description="Serve reflection, which grpcurl and buf curl ask for.")] = True
    keys_file: Annotated[
        Path | None,
        Field(
            description="API keys and their accounts, as `llama2-server keys new` prints them; read anew on changes."
        ),
    ] = None
    allow_open: Annotated[
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
        if self.keys_file is None and not self.allow_open and not _is_loopback(self.listen):
            raise ValueError(
                f"listen: {self.listen} is not loopback and there are no keys: anybody who reaches it could call; "
                "give a --keys-file, listen on 127.0.0.1, or say --allow-open"
            )
        return self


def _is_loopback(listen: str) -> bool:
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
