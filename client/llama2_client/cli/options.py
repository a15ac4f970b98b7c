"""What the commands of `llama2` share: options, and where the text to reply to comes from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Put several options on a command, in this order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")

input_options = options(
    click.argument("text", required=False),
    click.option(
        "--messages",
        type=click.File("r", encoding="utf-8"),
        metavar="FILE",
        help='Reply to a conversation instead: a JSON list of {"role": …, "content": …}.',
    ),
    click.option("--raw", is_flag=True, default=None, help="Continue TEXT as it is, without the chat template."),
)

# Left out means unset: the server's card decides, and it alone knows the limits.
sampling_options = options(
    click.option("--max-tokens", type=int, metavar="N", help="The most tokens to generate."),
    click.option("--temperature", type=float, metavar="X", help="How freely to sample; 0 is greedy."),
    click.option("--top-p", type=float, metavar="X", help="Sample from the likeliest tokens that add up to this."),
    click.option("--top-k", type=int, metavar="N", help="Sample from this many likeliest tokens; 0 is all."),
    click.option("--seed", type=int, metavar="N", help="The same request with the same seed gets the same reply."),
    click.option("--repetition-penalty", type=float, metavar="X", help="Above 1: repeat less."),
    click.option("--frequency-penalty", type=float, metavar="X", help="Above 0: repeat less, the more often the less."),
    click.option("--presence-penalty", type=float, metavar="X", help="Above 0: stay less with what was said."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the reply before this text; may be repeated."),
    click.option("--no-cache", is_flag=True, default=None, help="Neither read nor write the response cache."),
)


def read_input(text: str | None, messages: TextIO | None) -> tuple[str | None, list[Mapping[str, str]] | None]:
    """What to reply to: TEXT, standard input, or the conversation of a file."""
    if text is not None and messages is not None:
        raise click.UsageError("Give TEXT or --messages, not both.")
    if messages is not None:
        return None, _conversation(messages)
    if text is None:
        raise click.UsageError('Give TEXT, "-" for standard input, or --messages.')
    return sys.stdin.read().removesuffix("\n") if text == "-" else text, None


def _conversation(file: TextIO) -> list[Mapping[str, str]]:
    try:
        conversation = json.load(file)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--messages: {file.name} is not JSON: {error}") from error
    texts = isinstance(conversation, list) and all(
        isinstance(message, dict) and all(isinstance(value, str) for value in message.values())
        for message in conversation
    )
    if not texts:
        raise click.UsageError(f'--messages: {file.name} is not a list of {{"role": …, "content": …}}.')
    return list(conversation)
