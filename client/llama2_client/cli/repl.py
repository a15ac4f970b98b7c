"""`llama2 chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys

import click

from llama2_client.chat import Chat
from llama2_client.cli.output import exit_code, note, print_error, print_stream
from llama2_client.client import Client
from llama2_client.errors import InvalidRequest, Llama2Error

HELP = """\
/clear   forget the conversation
/exit    leave; Ctrl-D does too
/help    print this list
Ctrl-C   stop the reply; nothing of that turn is remembered"""

_PROMPT = "> "
_COMMAND = re.compile(r"/[a-z]+")


def converse(client: Client, chat: Chat, address: str, *, as_json: bool) -> int:
    """Answer line after line until the input ends, and return the exit code.

    At a terminal a turn that fails is reported and the conversation goes on; in a script it ends there.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - importing it gives `input` its editing and history

        note(f"Talking to {address}. Ctrl-C stops a reply, /help lists the commands, Ctrl-D leaves.")
    with asyncio.Runner() as runner:
        try:
            while (line := _read_line(interactive)) is not None:
                if not line.strip():
                    continue
                if interactive and _COMMAND.fullmatch(line.strip()):
                    if _obey(line.strip(), chat):
                        return 0
                    continue
                code = _take_turn(runner, chat, line, address, interactive=interactive, as_json=as_json)
                if code and not interactive:
                    return code
            return 0
        finally:
            runner.run(client.aclose())


def _read_line(interactive: bool) -> str | None:
    """The next line without its end; None when there are no more."""
    if not interactive:
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    while True:
        try:
            return input(_PROMPT)
        except KeyboardInterrupt:
            click.echo()  # the line that was being typed is dropped
        except EOFError:
            click.echo()
            return None


def _obey(command: str, chat: Chat) -> bool:
    """Carry out a command; True if it is the one that leaves."""
    match command:
        case "/exit" | "/quit":
            return True
        case "/clear":
            chat.clear()
            note("Forgotten.")
        case "/help":
            note(HELP)
        case _:
            note(f"There is no {command}; /help lists the commands.")
    return False


def _take_turn(runner: asyncio.Runner, chat: Chat, line: str, address: str, *, interactive: bool, as_json: bool) -> int:
    async def turn() -> None:
        await print_stream(chat.stream(line), as_json=as_json)

    try:
        runner.run(turn())  # it turns Ctrl-C into the cancellation of its task, and so of the call
    except KeyboardInterrupt:
        if not interactive:
            raise
        note("Stopped; this turn is forgotten.")
    except Llama2Error as error:
        print_error(error, address, as_json=as_json)
        if interactive and isinstance(error, InvalidRequest) and len(chat.history) > 1:
            note("If the conversation has grown too long, /clear forgets it.")
        return exit_code(error)
    return 0
