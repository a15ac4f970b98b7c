"""The interactive conversation of `llama2 chat`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys

import click

from llama2_client.aio.chat import Chat
from llama2_client.aio.client import Client
from llama2_client.cli.output import exit_code, print_error, print_note, print_stream
from llama2_client.errors import InvalidRequest, Llama2Error

HELP = """\
/clear   clear the conversation
/exit    leave; so does Ctrl-D
/help    show this list
Ctrl-C   stop the reply and drop the turn"""

_PROMPT = "> "
_COMMAND = re.compile(r"/[a-z]+")


def run_repl(client: Client, chat: Chat, address: str, *, as_json: bool) -> int:
    """Read and answer one line after another until the input ends. Return the exit code.

    In a terminal, a failed turn prints its error and the conversation continues. In a script, it ends the conversation.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if interactive:
        with contextlib.suppress(ImportError):  # Windows does not have readline
            import readline  # noqa: F401 - its import gives `input` editing and history

        print_note(f"Conversation with {address}. Ctrl-C stops a reply, /help lists the commands, Ctrl-D leaves.")
    with asyncio.Runner() as runner:
        try:
            while (line := _read_line(interactive)) is not None:
                if not line.strip():
                    continue
                if interactive and _COMMAND.fullmatch(line.strip()):
                    if _run_command(line.strip(), chat):
                        return 0
                    continue
                code = _run_turn(runner, chat, line, address, interactive=interactive, as_json=as_json)
                if code and not interactive:
                    return code
            return 0
        finally:
            runner.run(client.aclose())


def _read_line(interactive: bool) -> str | None:
    """Return the next line without its newline; None at the end of the input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    while True:
        try:
            return input(_PROMPT)
        except KeyboardInterrupt:
            click.echo()  # drop the partial line
        except EOFError:
            click.echo()
            return None


def _run_command(command: str, chat: Chat) -> bool:
    """Run a command of the conversation. Return True if it ends the conversation."""
    match command:
        case "/exit" | "/quit":
            return True
        case "/clear":
            chat.clear()
            print_note("Conversation cleared.")
        case "/help":
            print_note(HELP)
        case _:
            print_note(f"Unknown command {command}; /help lists the commands.")
    return False


def _run_turn(runner: asyncio.Runner, chat: Chat, line: str, address: str, *, interactive: bool, as_json: bool) -> int:
    """Send a line and print the reply. Return the exit code of the turn."""

    async def turn() -> None:
        await print_stream(chat.stream(line), as_json=as_json)

    try:
        runner.run(turn())  # Ctrl-C cancels the task, and the cancelled task cancels the call
    except KeyboardInterrupt:
        if not interactive:
            raise
        print_note("Stopped. The conversation continues without this turn.")
    except Llama2Error as error:
        print_error(error, address, as_json=as_json)
        if interactive and isinstance(error, InvalidRequest) and len(chat.history) > 1:
            print_note("If the conversation is too long, clear it with /clear.")
        return exit_code(error)
    return 0
