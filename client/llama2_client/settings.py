"""The arguments of a client, checked once for `Client` and `SyncClient`."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from llama2_client.arguments import check_type, integer, seconds
from llama2_client.channel import (
    DEFAULT_PORT,
    MAX_ATTEMPTS,
    channel_credentials,
    channel_options,
    grpc_target,
)
from llama2_client.connection_errors import explain
from llama2_client.errors import Llama2Error

DEFAULT_TARGET = f"localhost:{DEFAULT_PORT}"
DEFAULT_TIMEOUT_SECONDS = 120.0
# Three years. gRPC's clock overflows far above this, and the call would fail immediately.
MAX_TIMEOUT_SECONDS = 1e8


@dataclass(frozen=True)
class ClientSettings:
    """The address of a server, and how a client calls it."""

    address: str  # as the user gave it
    target: str
    timeout: float | None  # seconds; None for no deadline
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    credentials: grpc.ChannelCredentials | None
    channel_options: tuple[tuple[str, str | int], ...]
    quota_wait: float  # seconds
    resume: bool
    max_attempts: int

    @classmethod
    def create(
        cls,
        target: str,
        *,
        api_key: str | None,
        timeout: float | None,
        tls: bool | bytes | grpc.ChannelCredentials,
        server_name: str | None,
        max_attempts: int,
        quota_wait: float,
        resume: bool,
    ) -> ClientSettings:
        """Check the arguments of a client.

        Raises:
            TypeError: an argument has the wrong type; the error names it.
            ValueError: an argument has an invalid value; the error names it and never contains the key.
        """
        check_type("target", target, str, "a string")
        check_type("resume", resume, bool, "True or False")
        if not 1 <= integer("max_attempts", max_attempts) <= MAX_ATTEMPTS:
            raise ValueError(f"max_attempts: must be from 1 to {MAX_ATTEMPTS}, got {max_attempts}")
        if seconds("quota_wait", quota_wait) < 0:
            raise ValueError(f"quota_wait: must be at least 0 seconds, got {quota_wait}")
        credentials = channel_credentials(tls)
        if server_name is not None:
            check_type("server_name", server_name, str, "a string")
            if credentials is None:
                raise ValueError("server_name: needs TLS; pass tls, too")
        return cls(
            address=target,
            target=grpc_target(target),
            timeout=None if timeout is None else seconds("timeout", timeout),
            metadata=_metadata(api_key),
            credentials=credentials,
            channel_options=channel_options(grpc_target(target), max_attempts, server_name),
            quota_wait=float(quota_wait),
            resume=resume,
            max_attempts=max_attempts,
        )

    def deadline_seconds(self, timeout: float | None) -> float | None:
        """Return the seconds that a call may take: its own timeout, or the client's; None for no deadline."""
        chosen = self.timeout if timeout is None else seconds("timeout", timeout)
        return None if chosen is None or chosen > MAX_TIMEOUT_SECONDS else chosen

    def explain(self, error: Llama2Error, *, connected: bool = True) -> Llama2Error:
        """Return the error, with the problem and its remedy in the message if no server answered."""
        return explain(error, self.address, self.target, tls=self.credentials is not None, connected=connected)


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    if api_key is None:
        return ()
    check_type("api_key", api_key, str, "a string")
    # gRPC's own error would contain the whole header, including the key.
    if not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key: must be printable ASCII, and not empty; copy the key again")
    return (("authorization", f"Bearer {api_key}"),)
