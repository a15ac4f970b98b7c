"""The server that a `llama2` command calls, and the handling of failed calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from llama2_client.cli.options import options
from llama2_client.cli.signals import Interruptible
from llama2_client.cli.usage_errors import name_of

# gRPC is imported when a call starts, because the import is slow and `llama2 --help` does not need it.
if TYPE_CHECKING:
    import grpc

    from llama2_client.aio.client import Client

T = TypeVar("T")

# The options of the program for the client's parameters.
_OPTIONS = {"target": "address"} | {name: name for name in ("api_key", "timeout", "server_name", "quota_wait")}
_NEEDS_TLS = "needs TLS; add --tls or --ca FILE"

# The options of `llama2` itself, before the name of a command.
connection_options = options(
    click.option(
        "--address",
        envvar="LLAMA2_ADDRESS",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        show_default=True,
        show_envvar=True,
        help="Address of the server, or any other gRPC target.",
    ),
    click.option(
        "--api-key",
        envvar="LLAMA2_API_KEY",
        metavar="KEY",
        show_envvar=True,
        help="API key of the account. The variable is safer: other users of the machine can read command lines.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        envvar="LLAMA2_TIMEOUT",
        default=120.0,
        metavar="SECONDS",
        show_default=True,
        show_envvar=True,
        help="Deadline of a call in seconds, including queue time and retries.",
    ),
    click.option("--tls", is_flag=True, help="Connect with TLS and trust the public root certificates."),
    click.option(
        "--ca",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Connect with TLS and trust the root certificates in this PEM file instead.",
    ),
    click.option(
        "--certificate",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Client certificate chain for mutual TLS, in PEM; implies --tls.",
    ),
    click.option(
        "--key",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Private key of the client certificate, in PEM.",
    ),
    click.option(
        "--server-name",
        metavar="NAME",
        help="Host name to expect in the server's certificate, if it is not the host of --address.",
    ),
    click.option(
        "--quota-wait",
        type=click.FloatRange(min=0),
        envvar="LLAMA2_QUOTA_WAIT",
        default=0.0,
        metavar="SECONDS",
        show_default=True,
        show_envvar=True,
        help="Longest time to wait for a used-up quota, within --timeout.",
    ),
    click.option(
        "--resume/--no-resume",
        default=True,
        show_default=True,
        help="Continue a reply whose connection breaks, also after a restart of the server, at no extra cost.",
    ),
)


@dataclass(frozen=True)
class ClientCertificate:
    """A client certificate for mutual TLS, as PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class ServerConnection:
    """The server's address and how to connect to it."""

    address: str
    api_key: str | None = field(repr=False)
    timeout: float
    tls: bool
    ca: Path | None
    client_certificate: ClientCertificate | None = None
    server_name: str | None = None
    quota_wait: float = 0.0
    resume: bool = True

    def client(self) -> Client:
        """Create the client; it connects at its first call."""
        from llama2_client.aio.client import Client

        try:
            return Client(
                self.address,
                api_key=self.api_key,
                timeout=self.timeout,
                tls=self._tls(),
                server_name=self.server_name,
                quota_wait=self.quota_wait,
                resume=self.resume,
            )
        except OSError as error:
            raise click.UsageError(f"{error.filename}: {error.strerror}; pass a file that you can read") from error
        except ValueError as error:
            # Name the flag, not the parameter of `Client`.
            subject, _, problem = str(error).partition(": ")
            problem = _NEEDS_TLS if problem.startswith("needs TLS") else problem
            raise click.UsageError(
                f"{name_of(_OPTIONS[subject]) if subject in _OPTIONS else subject}: {problem}"
            ) from error

    def _tls(self) -> bool | bytes | grpc.ChannelCredentials:
        """Return the `tls` argument of `Client`."""
        if self.ca is None and self.client_certificate is None:
            return self.tls
        self._check_files()
        ca = None if self.ca is None else self.ca.read_bytes()
        if self.client_certificate is None:
            return self.tls if ca is None else ca
        import grpc

        key, chain = self.client_certificate.key.read_bytes(), self.client_certificate.certificate.read_bytes()
        return grpc.ssl_channel_credentials(ca, key, chain)

    def _check_files(self) -> None:
        """Raise ValueError for invalid PEM files, which gRPC would only report as a failed connection."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca is not None:
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError as error:
                message = f"--ca: {self.ca} is not a PEM certificate; pass the certificate of the server's authority"
                raise ValueError(message) from error
        if self.client_certificate is not None:
            certificate, key = self.client_certificate.certificate, self.client_certificate.key
            try:
                context.load_cert_chain(certificate, key, password=lambda: "")
            except ssl.SSLError as error:
                message = (
                    f"--certificate and --key: {certificate} and {key} are not a matching pair of PEM files; "
                    "pass the files that belong together"
                )
                raise ValueError(message) from error

    def run(self, call: Callable[[Client], Awaitable[T]], *, as_json: bool) -> T:
        """Run a call. If it fails, print the error and exit with the code for its kind."""
        import asyncio

        from llama2_client.cli.errors import exit_code, print_error
        from llama2_client.errors import Llama2Error

        client = self.client()  # imports gRPC; in the event loop, Ctrl-C would cancel a task after the import

        async def session() -> T:
            async with client:
                return await call(client)

        try:
            with Interruptible():
                return asyncio.run(session())
        except Llama2Error as error:
            print_error(error, self.address, as_json=as_json)
            raise click.exceptions.Exit(exit_code(error)) from error
