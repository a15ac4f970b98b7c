"""Which server the `llama2` command talks to, and what becomes of a call that fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

# gRPC is imported when a call is made: `llama2 --help` shall not wait for it.
if TYPE_CHECKING:
    import grpc

    from llama2_client.client import Client

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """Who the caller is, for a server that asks for client certificates: PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Connection:
    """Which server to call, and how."""

    address: str
    api_key: str | None = field(repr=False)
    timeout: float
    tls: bool
    ca: Path | None
    identity: Identity | None = None

    def client(self) -> Client:
        """Make the client; it connects at the first call."""
        from llama2_client.client import Client

        try:
            return Client(self.address, api_key=self.api_key, timeout=self.timeout, tls=self._tls())
        except (OSError, ValueError) as error:
            raise click.UsageError(str(error)) from error

    def _tls(self) -> bool | bytes | grpc.ChannelCredentials:
        """What `Client` takes for it."""
        if self.ca is None and self.identity is None:
            return self.tls
        self._check_files()
        ca = None if self.ca is None else self.ca.read_bytes()
        if self.identity is None:
            return self.tls if ca is None else ca
        import grpc

        return grpc.ssl_channel_credentials(ca, self.identity.key.read_bytes(), self.identity.certificate.read_bytes())

    def _check_files(self) -> None:
        """Raise ValueError for files that are not what they should be: gRPC would only say that it cannot connect."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca is not None:
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError as error:
                raise ValueError(f"--ca: {self.ca} holds no PEM certificate that can be read") from error
        if self.identity is not None:
            certificate, key = self.identity.certificate, self.identity.key
            try:
                context.load_cert_chain(certificate, key, password=lambda: "")
            except ssl.SSLError as error:
                message = f"--certificate and --key: {certificate} and {key} are no pair of PEM files"
                raise ValueError(message) from error

    def run(self, call: Callable[[Client], Awaitable[T]], *, as_json: bool) -> T:
        """Make a call; when it fails, print why and exit with the code that tells the kind."""
        import asyncio

        from llama2_client.cli import output
        from llama2_client.errors import Llama2Error

        async def session() -> T:
            async with self.client() as client:
                return await call(client)

        try:
            return asyncio.run(session())
        except Llama2Error as error:
            output.print_error(error, self.address, as_json=as_json)
            raise click.exceptions.Exit(output.exit_code(error)) from error
