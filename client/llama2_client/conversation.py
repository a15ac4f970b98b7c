"""The state of a conversation: the system message and the completed turns."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

from llama2_client.reply import Message, Reply


class _Stream(Protocol):
    @property
    def closed(self) -> bool:
        """True if no more text can follow."""


class Conversation:
    """The messages of a conversation with the model; `Chat` and `SyncChat` add the calls.

    Args:
        system: the system message; None uses the card's default. It can be changed between turns.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: tuple[Message, ...] = ()
        self._open_stream: weakref.ref[_Stream] | None = None

    @property
    def history(self) -> tuple[Message, ...]:
        """The messages of the completed turns, preceded by the system message if one is set."""
        system = () if self.system is None else (Message("system", self.system),)
        return system + self._turns

    def restore(self, messages: Iterable[Message | Mapping[str, str]]) -> None:
        """Replace the system message and the turns by those of a conversation that `history` returned earlier.

        Raises:
            ValueError: `messages` is not an optional system message, then pairs of a user's message and its answer.
        """
        history = tuple(
            message if isinstance(message, Message) else Message(message.get("role", ""), message.get("content", ""))
            for message in messages
        )
        has_system = bool(history) and history[0].role == "system"
        turns = history[has_system:]
        expected = ("user", "assistant")
        for index, message in enumerate(turns):
            if message.role != expected[index % 2]:
                raise ValueError(
                    f"messages[{index + has_system}].role: must be {expected[index % 2]!r}, not {message.role!r}"
                )
        if len(turns) % 2:
            raise ValueError("messages: the last one is a question without an answer; remove it and ask it again")
        self.system = history[0].content if has_system else None
        self._turns = turns

    def clear(self) -> None:
        """Remove all turns from the history; the system message stays."""
        self._turns = ()

    def undo(self) -> str | None:
        """Remove the last turn from the history and return its question; None if the history has no turn."""
        if not self._turns:
            return None
        *turns, question, _ = self._turns
        self._turns = tuple(turns)
        return question.content

    def _check_closed(self) -> None:
        """Raise RuntimeError if the previous turn is still open."""
        previous = self._open_stream() if self._open_stream is not None else None
        if previous is not None and not previous.closed:
            raise RuntimeError("the previous turn is still open; read its stream to the end or close it")

    def _append(self, question: Message, reply: Reply) -> None:
        self._turns += (question, Message("assistant", reply.text))
