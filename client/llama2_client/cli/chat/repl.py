"""The interactive conversation of `llama2 chat`."""

from __future__ import annotations

import asyncio
import sys

import click

from llama2_client.aio.chat import Chat
from llama2_client.aio.client import Client
from llama2_client.cli.chat.commands import ChatCommands
from llama2_client.cli.errors import exit_code, print_error
from llama2_client.cli.output import print_note, print_stream
from llama2_client.errors import InvalidRequest, Llama2Error

_PROMPT = "> "


def run_repl(client: Client, chat: Chat, address: str, *, as_json: bool) -> int:
    """Read and answer one turn after another until the input ends. Return the exit code.

    In a terminal, a failed turn prints its error and the conversation continues. In a script, it ends the conversation.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    with asyncio.Runner() as runner:
        try:
            if interactive:
                return _converse(runner, client, chat, address)
            return _run_script(runner, chat, address, as_json=as_json)
        finally:
            runner.run(client.aclose())


def _converse(runner: asyncio.Runner, client: Client, chat: Chat, address: str) -> int:
    """Answer turns and run commands in a terminal until the user leaves."""
    _enable_editing()
    print_note(f"Conversation with {address}. Ctrl-C stops a reply, /help lists the commands, Ctrl-D leaves.")
    commands = ChatCommands(chat, lambda since: runner.run(client.usage(since=since)))
    while (text := _read_turn()) is not None:
        try:
            turn = commands.next_turn(text)
            if turn is not None:
                runner.run(_answer(chat, turn.question, commands, seed=turn.seed))
        except KeyboardInterrupt:
            print_note("Stopped. The conversation continues without this turn.")
        except Llama2Error as error:
            print_error(error, address, as_json=False)
            if isinstance(error, InvalidRequest) and len(chat.history) > 1:
                print_note("If the conversation is too long, clear it with /clear.")
        if commands.ended:
            break
    return 0


async def _answer(chat: Chat, question: str, commands: ChatCommands, *, seed: int | None) -> None:
    """Stream one turn; Ctrl-C cancels this task, which cancels the call."""
    stream = chat.stream(question) if seed is None else chat.stream(question, seed=seed)
    await print_stream(stream, as_json=False)
    commands.completed(stream.reply)


def _run_script(runner: asyncio.Runner, chat: Chat, address: str, *, as_json: bool) -> int:
    """Answer each line of standard input that is not empty."""
    for line in sys.stdin:
        if line.strip():
            try:
                runner.run(_print_turn(chat, line.removesuffix("\n"), as_json=as_json))
            except Llama2Error as error:
                print_error(error, address, as_json=as_json)
                return exit_code(error)
    return 0


async def _print_turn(chat: Chat, line: str, *, as_json: bool) -> None:
    """Stream one turn of a script."""
    await print_stream(chat.stream(line), as_json=as_json)


def _enable_editing() -> None:
    """Load readline, which gives `input` editing and history, and returns a pasted text of several lines at once."""
    try:
        import readline
    except ImportError:  # Windows
        return
    if "GNU" in (readline.__doc__ or ""):
        # Python disables it, although terminals mark pasted text and readline 8 understands the marks.
        readline.parse_and_bind("set enable-bracketed-paste on")


def _read_turn() -> str | None:
    """Return the next text that is not empty; None at the end of the input."""
    while True:
        try:
            text = input(_PROMPT)
        except KeyboardInterrupt:
            click.echo()  # drop the partial line
        except EOFError:
            click.echo()
            return None
        else:
            if text.strip():
                return text
