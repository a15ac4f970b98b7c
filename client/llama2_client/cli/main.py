"""The `llama2` command and its subcommands: generate, chat, card, tokens, usage, verify, health, completion."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from llama2_client.cli.connection import ClientCertificate, ServerConnection, connection_options
from llama2_client.cli.options import input_options, json_option, read_conversation, read_input, sampling_options
from llama2_client.cli.signals import Interruptible, ignore_signals
from llama2_client.cli.usage_errors import CommandGroup, error_message, print_error_line
from llama2_client.cli.verify import verify

# gRPC is imported when a call starts, because the import is slow and `llama2 --help` does not need it.
if TYPE_CHECKING:
    from datetime import datetime

    from llama2_client.aio.client import Client

PROGRAM = "llama2"
COMPLETION_VARIABLE = "_LLAMA2_COMPLETE"  # set by the completion script when the shell asks for words
EXIT_WRONG_USAGE = 2
EXIT_INTERRUPTED = 130


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@connection_options
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
    server_name: str | None,
    quota_wait: float,
    resume: bool,
) -> None:
    """Call a llama2-grpc server.

    \b
    Exit codes:
      0    success
      1    other error
      2    wrong usage or invalid request
      3    the server is unreachable, not ready or not serving
      4    rejected for now: the quota is used up or the queue is full
      5    not authenticated or not permitted
      6    the deadline passed
      130  interrupted with Ctrl-C
      143  stopped by SIGTERM
    """  # noqa: D301 - \b is click's escape that keeps these lines unwrapped
    if (certificate is None) != (key is None):
        raise click.UsageError("--certificate and --key: one of them is missing; give both")
    client_certificate = None if certificate is None or key is None else ClientCertificate(certificate, key)
    context.obj = ServerConnection(
        address, api_key, timeout, tls, ca, client_certificate, server_name, quota_wait, resume
    )


@cli.command(short_help="Generate a reply to TEXT.")
@input_options
@sampling_options
@click.option("--no-stream", is_flag=True, help="Print the whole reply at its end instead of streaming it.")
@click.option(
    "--save-receipt",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write request, text and receipt to FILE, for `llama2 verify`.",
)
@json_option
@click.pass_obj
def generate(
    connection: ServerConnection,
    /,
    text: str | None,
    messages: TextIO | None,
    raw: bool | None,
    no_stream: bool,
    save_receipt: Path | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate a reply to TEXT, or to standard input if TEXT is missing or "-".

    Streams the reply to standard output, then prints one line of statistics to standard error.

    With --json, each line is a message of the API in JSON: {"response": DELTA} for each part, and at the end
    {"response": "", "completion": {…}}. With --json and --no-stream, the output is one message with the whole text in
    "response". An error is {"error": STATUS} on standard error, with a google.rpc.Status.
    """
    prompt, conversation = read_input(text, messages)
    if save_receipt is not None and not save_receipt.parent.is_dir():  # before the reply is paid for
        raise click.UsageError(f"--save-receipt: directory {save_receipt.parent} does not exist; create it")

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        stream = client.stream(prompt, messages=conversation, raw=raw, **sampling)  # it survives a broken connection
        if no_stream:
            await output.print_whole(stream, as_json=as_json)
        else:
            await output.print_stream(stream, as_json=as_json)
        if save_receipt is not None:
            output.write_receipt(stream.reply, save_receipt)

    connection.run(call, as_json=as_json)


@cli.command()
@click.option("--system", metavar="TEXT", help="System message: instructions for the model.")
@click.option(
    "--messages",
    type=click.File("r", encoding="utf-8"),
    metavar="FILE",
    help="Continue the conversation in this file, which /save wrote.",
)
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON as `generate` does, for scripts.")
@click.pass_obj
def chat(
    connection: ServerConnection, /, system: str | None, messages: TextIO | None, as_json: bool, **sampling: Any
) -> None:
    """Have a conversation with the model.

    Ctrl-C stops a reply, /help lists the commands (such as /retry and /save), Ctrl-D or /exit leaves. A pasted text of
    several lines is one turn. If standard input is not a terminal, each of its lines is one turn.
    """
    from llama2_client.cli.chat import repl

    client = connection.client()
    conversation = client.chat(system, **sampling)
    if messages is not None:
        try:
            conversation.restore(read_conversation(messages))
        except ValueError as error:
            raise click.UsageError(f"--messages: {messages.name} is not a conversation of `/save` ({error})") from error
        conversation.system = system or conversation.system
    with Interruptible():
        code = repl.run_repl(client, conversation, connection.address, as_json=as_json)
    raise click.exceptions.Exit(code)


@cli.command()
@json_option
@click.pass_obj
def card(connection: ServerConnection, as_json: bool) -> None:
    """Show the model card: limits, prices and defaults. With --json, show all of it, including the schemas."""

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        output.print_card(await client.model_card(), as_json=as_json)

    connection.run(call, as_json=as_json)


@cli.command(short_help="Count the input tokens of TEXT.")
@input_options
@click.option("--max-tokens", type=int, metavar="N", help="Number of output tokens of the price; the card's default.")
@json_option
@click.pass_obj
def tokens(
    connection: ServerConnection,
    /,
    text: str | None,
    messages: TextIO | None,
    raw: bool | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Count the input tokens of TEXT, or of standard input if TEXT is missing or "-", without generating a reply.

    Also shows the highest price of a reply, the rest of the quota, and the estimated time in the queue.
    """
    prompt, conversation = read_input(text, messages)

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        count = await client.count_tokens(prompt, messages=conversation, raw=raw, max_tokens=max_tokens)
        output.print_count(count, as_json=as_json)

    connection.run(call, as_json=as_json)


@cli.command(short_help="Show the usage and quota of this account.")
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="YYYY-MM-DD",
    help="First day, in UTC; by default 30 days before the last one.",
)
@click.option(
    "--until", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help="Last day, in UTC; by default today."
)
@json_option
@click.pass_obj
def usage(connection: ServerConnection, /, since: datetime | None, until: datetime | None, as_json: bool) -> None:
    """Show this account's daily requests, tokens and neurons, and the rest of its quota."""

    async def call(client: Client) -> None:
        from llama2_client.cli import output

        first, last = (day.date() if day else None for day in (since, until))
        output.print_usage(await client.usage(since=first, until=last), as_json=as_json)

    connection.run(call, as_json=as_json)


@cli.command(short_help="Check whether the server is serving.")
@click.argument("service", default="")
@json_option
@click.pass_obj
def health(connection: ServerConnection, /, service: str, as_json: bool) -> None:
    """Check whether the server is serving, or one SERVICE of it, given by its full name."""

    async def call(client: Client) -> int:
        from llama2_client.cli import output

        status = await client.health(service)
        output.print_health(status, as_json=as_json)
        return output.HEALTH_EXIT_CODES[status]

    raise click.exceptions.Exit(connection.run(call, as_json=as_json))


@cli.command(short_help="Print the shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="SHELL")
def completion(shell: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    \b
    bash:  eval "$(llama2 completion bash)"                  in ~/.bashrc
    zsh:   eval "$(llama2 completion zsh)"                   in ~/.zshrc, after compinit
    fish:  llama2 completion fish > ~/.config/fish/completions/llama2.fish
    """  # noqa: D301 - \b is click's escape that keeps these lines unwrapped
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    if script is not None:
        click.echo(script(cli, {}, PROGRAM, COMPLETION_VARIABLE).source())


cli.add_command(verify)


def main() -> None:
    """Run the command and exit with its code."""
    # Text is UTF-8 in every locale. Other bytes become lone surrogates, which the client rejects with the field's name.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    # gRPC's own log lines would interrupt the reply.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code = cli.main(prog_name=PROGRAM, complete_var=COMPLETION_VARIABLE, standalone_mode=False)
    except click.ClickException as error:
        print_error_line(error_message(error))
        code = EXIT_WRONG_USAGE
    except click.Abort:
        code = EXIT_INTERRUPTED
    finally:
        with suppress(OSError, ValueError):  # the reader of the output has gone
            sys.stdout.flush()
        ignore_signals()  # while the interpreter ends, Python would print a traceback
    sys.exit(code if isinstance(code, int) else 0)
