"""A conversation: `Chat` keeps the history that makes each turn an answer to those before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Unpack

from llama2_client.reply import Message, Reply, ReplyStream
from llama2_client.request import GenerationOptions


class Chat:
    """A conversation with the model.

    ```python
    chat = client.chat(system="You are a pirate.")
    print((await chat.say("Where are we?")).text)
    print((await chat.say("And where to?")).text)
    ```

    The history holds completed turns only. A turn that fails, is cancelled or is left early leaves no trace in it,
    neither the question nor the part of the answer that came: say it again, or something else. Turns come one after the
    other: to begin one while another is open raises RuntimeError.

    Args:
        stream: starts a reply; `Client.stream`.
        system: how the model shall behave; None for the card's default.
        defaults: generation options of every turn; a turn's own go before them.
    """

    def __init__(
        self, stream: Callable[..., ReplyStream], system: str | None = None, **defaults: Unpack[GenerationOptions]
    ) -> None:
        self.system = system
        self._stream = stream
        self._defaults = defaults
        self._turns: tuple[Message, ...] = ()
        self._open: weakref.ref[ReplyStream] | None = None

    @property
    def history(self) -> tuple[Message, ...]:
        """The completed turns so far, the system message before them if there is one."""
        system = () if self.system is None else (Message("system", self.system),)
        return system + self._turns

    async def say(self, text: str, **options: Unpack[GenerationOptions]) -> Reply:
        """Say something and wait for the whole reply."""
        async with self.stream(text, **options) as stream:
            async for _ in stream:
                pass
        return stream.reply

    def stream(self, text: str, **options: Unpack[GenerationOptions]) -> ReplyStream:
        """Say something and return the reply as it comes; read it to its end for the turn to count."""
        turn_before = self._open() if self._open is not None else None
        if turn_before is not None and not turn_before.closed:
            raise RuntimeError("the turn before has not ended: read it to its end or close it")

        question = Message("user", text)
        merged: GenerationOptions = {**self._defaults, **options}
        stream = self._stream(messages=(*self.history, question), **merged)

        def keep(reply: Reply) -> None:
            self._turns += (question, Message("assistant", reply.text))

        stream.when_complete(keep)
        self._open = weakref.ref(stream)
        return stream

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns = ()
