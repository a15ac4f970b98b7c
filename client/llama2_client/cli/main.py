"""The `llama2` command: generate, chat, card, tokens, usage, health."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from llama2_client.cli.connection import Connection, Identity
from llama2_client.cli.options import input_options, json_option, read_input, sampling_options

# gRPC is imported when a call is made: `llama2 --help` shall not wait for it.
if TYPE_CHECKING:
    from datetime import datetime

    from llama2_client.client import Client

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--address",
    envvar="LLAMA2_ADDRESS",
    default="127.0.0.1:50051",
    metavar="HOST:PORT",
    show_default=True,
    show_envvar=True,
    help="The server; any gRPC target will do.",
)
@click.option(
    "--api-key",
    envvar="LLAMA2_API_KEY",
    metavar="KEY",
    show_envvar=True,
    help="The account's key. The variable is safer: other users of the machine can read a command line.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    envvar="LLAMA2_TIMEOUT",
    default=120.0,
    metavar="SECONDS",
    show_default=True,
    show_envvar=True,
    help="When to give up a call, waiting in line included.",
)
@click.option("--tls", is_flag=True, help="Speak TLS, and trust the public root certificates.")
@click.option(
    "--ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Speak TLS, and trust the root certificates of this PEM file instead.",
)
@click.option(
    "--certificate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Show the server this certificate chain, PEM (mutual TLS).",
)
@click.option(
    "--key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The private key of the certificate, PEM.",
)
@click.version_option(package_name="llama2-grpc", prog_name="llama2", message="%(prog)s %(version)s")
@click.pass_context
def cli(
    context: click.Context,
    address: str,
    api_key: str | None,
    timeout: float,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
) -> None:
    """Talk to a llama2-grpc server.

    \b
    Exit codes:
      0    all went well
      1    anything that is not below
      2    wrong usage, or an invalid request
      3    the server is not reachable, not ready, or not serving
      4    refused for now: the quota is used up, or the waiting line is full
      5    not authenticated, or not permitted
      6    the deadline passed
      130  Ctrl-C
    """  # noqa: D301 - click's own escape: keep these lines as they are
    if (certificate is None) != (key is None):
        raise click.UsageError("Give --certificate and --key together.")
    identity = None if certificate is None or key is None else Identity(certificate, key)
    context.obj = Connection(address, api_key, timeout, tls, ca, identity)


@cli.command(short_help="Generate a reply to TEXT.")
@input_options
@sampling_options
@click.option("--no-stream", is_flag=True, help="Wait for the whole reply instead of printing it as it comes.")
@json_option
@click.pass_obj
def generate(
    connection: Connection,
    /,
    text: str | None,
    messages: TextIO | None,
    raw: bool | None,
    no_stream: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate a reply to TEXT, or to standard input if TEXT is "-".

    The reply goes to standard output as it comes, one line of figures after it to standard error.

    With --json every line is an object: {"response": DELTA} for each part, and for the last one
    {"response": "", "completion": {…}}. With --no-stream as well there is one object, with the whole text in
    "response". "seed" and "neurons" are strings, so that no digit is lost. An error is an object too, on standard
    error.
    """
    prompt, conversation = read_input(text, messages)

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        if no_stream:
            reply = await client.generate(prompt, messages=conversation, raw=raw, **sampling)
            output.print_reply(reply, as_json=as_json)
        else:
            stream = client.stream(prompt, messages=conversation, raw=raw, **sampling)
            await output.print_stream(stream, as_json=as_json)

    connection.run(call, as_json=as_json)


@cli.command()
@click.option("--system", metavar="TEXT", help="How the model shall behave.")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON as `generate` does, for scripts.")
@click.pass_obj
def chat(connection: Connection, /, system: str | None, as_json: bool, **sampling: Any) -> None:
    """Talk with the model; it remembers the conversation.

    Ctrl-C stops a reply, /clear forgets the conversation, /help lists the commands, Ctrl-D or /exit leaves. When
    standard input is not a terminal, each of its lines is a turn.
    """
    from llama2_client.cli import repl

    client = connection.client()
    conversation = client.chat(system, **sampling)
    raise click.exceptions.Exit(repl.converse(client, conversation, connection.address, as_json=as_json))


@cli.command()
@json_option
@click.pass_obj
def card(connection: Connection, as_json: bool) -> None:
    """Show the model card: limits, prices, defaults. With --json all of it, the schemas included."""

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        output.print_card(await client.model_card(), as_json=as_json)

    connection.run(call, as_json=as_json)


@cli.command(short_help="Count the input tokens of TEXT.")
@input_options
@json_option
@click.pass_obj
def tokens(
    connection: Connection, /, text: str | None, messages: TextIO | None, raw: bool | None, as_json: bool
) -> None:
    """Count the input tokens of TEXT, or of standard input if TEXT is "-", without generating."""
    prompt, conversation = read_input(text, messages)

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        output.print_count(await client.count_tokens(prompt, messages=conversation, raw=raw), as_json=as_json)

    connection.run(call, as_json=as_json)


@cli.command(short_help="Show what this account has used.")
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help="The first day, in UTC.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help="The last day, in UTC.")
@json_option
@click.pass_obj
def usage(connection: Connection, /, since: datetime | None, until: datetime | None, as_json: bool) -> None:
    """Show this account's requests, tokens and neurons by day, and what is left of its quota."""

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        first, last = (day.date() if day else None for day in (since, until))
        output.print_usage(await client.usage(since=first, until=last), as_json=as_json)

    connection.run(call, as_json=as_json)


@cli.command(short_help="Ask whether the server is serving.")
@click.argument("service", default="")
@json_option
@click.pass_obj
def health(connection: Connection, /, service: str, as_json: bool) -> None:
    """Ask whether the server, or one SERVICE of it by its full name, is serving."""

    async def call(client: Client) -> int:
        from llama2_client.cli import output

        status = await client.health(service)
        output.print_health(service, status, as_json=as_json)
        return output.HEALTH_EXIT_CODES[status]

    raise click.exceptions.Exit(connection.run(call, as_json=as_json))


def main() -> None:
    """Run the command and exit with its code."""
    # Text is UTF-8 whatever the locale says; what is not comes as lone surrogates, which the client refuses by name.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    # gRPC's own log lines would come between the model's.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code = cli.main(prog_name="llama2", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)
