"""The state of a conversation: the system message and the completed turns."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from llama2_client.reply import Message, Reply


class _Stream(Protocol):
    @property
    def closed(self) -> bool:
        """True if no more text can follow."""


def _role_and_content(message: Message | Mapping[str, str]) -> tuple[str, str]:
    if isinstance(message, Message):
        return message.role, message.content
    return message.get("role", ""), message.get("content", "")


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
        system: str | None = None
        turns: list[Message] = []
        for index, message in enumerate(messages):
            role, content = _role_and_content(message)
            if index == 0 and role == "system":
                system = content
                continue
            expected: Literal["user", "assistant"] = "assistant" if len(turns) % 2 else "user"
            if role != expected:
                raise ValueError(f"messages[{index}].role: must be {expected!r}, not {role!r}")
            turns.append(Message(expected, content))
        if len(turns) % 2:
            raise ValueError("messages: the last one is a question without an answer; remove it and ask it again")
        self.system = system
        self._turns = tuple(turns)

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
