"""Options and inputs that the commands of `llama2` share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine several option decorators into one, in this order."""

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
        help='Use the conversation in this file instead of TEXT: a JSON list of {"role": …, "content": …}.',
    ),
    click.option("--raw", is_flag=True, default=None, help="Continue TEXT without the chat template."),
)

# Options without a value are not sent: the server applies the card's defaults and checks the card's limits.
sampling_options = options(
    click.option("--max-tokens", type=int, metavar="N", help="Maximum number of tokens to generate."),
    click.option("--temperature", type=float, metavar="X", help="Sampling temperature; 0 is greedy."),
    click.option(
        "--top-p",
        type=float,
        metavar="X",
        help="Sample from the most likely tokens whose probabilities add up to X; 1 is off.",
    ),
    click.option("--top-k", type=int, metavar="N", help="Sample from the N most likely tokens; 0 is off."),
    click.option(
        "--seed", type=int, metavar="N", help="Random seed; equal requests with equal seeds get equal replies."
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="Penalize tokens that appeared in the prompt or the reply; 1 is off.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help="Penalize tokens by how often they appeared in the reply; 0 is off.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="Penalize tokens that already appeared in the reply; 0 is off.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the reply before this text; can be repeated."),
    click.option("--no-cache", is_flag=True, default=None, help="Neither read nor write the response cache."),
)


def read_input(text: str | None, messages: TextIO | None) -> tuple[str | None, list[Mapping[str, str]] | None]:
    """Return the prompt from TEXT or standard input, or the conversation from a file."""
    if text is not None and messages is not None:
        raise click.UsageError("TEXT and --messages: exclude each other; give one of them")
    if messages is not None:
        return None, read_conversation(messages)
    if text is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("TEXT: missing; give TEXT or --messages, or pipe the text to standard input")
    if text is None or text == "-":
        piped = sys.stdin.read().removesuffix("\n")
        if text is None and not piped:
            raise click.UsageError("TEXT: missing, and standard input is empty; give TEXT or --messages")
        return piped, None
    return text, None


def read_conversation(file: TextIO) -> list[Mapping[str, str]]:
    """Return the messages of a JSON file."""
    try:
        conversation = json.load(file)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(
            f"--messages: {file.name} is not valid JSON ({error}); pass a list of messages"
        ) from error
    is_conversation = isinstance(conversation, list) and all(
        isinstance(message, dict) and all(isinstance(value, str) for value in message.values())
        for message in conversation
    )
    if not is_conversation:
        raise click.UsageError(
            f'--messages: {file.name} does not have the form [{{"role": …, "content": …}}]; correct the file'
        )
    return list(conversation)
