"""A conversation with the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Unpack

from llama2_client.conversation import Conversation
from llama2_client.reply import Message, Reply
from llama2_client.request import GenerationOptions
from llama2_client.sync.reply_stream import SyncReplyStream


class SyncChat(Conversation):
    """A conversation with the model: each turn sends the completed turns before it.

    ```python
    chat = client.chat(system="You are a pirate.")
    print(chat.send("Where are we?").text)
    print(chat.send("And where to?").text)
    ```

    The history holds completed turns only. A turn that fails or is closed early leaves no trace in it: neither the
    question nor the partial answer. Send the same text again, or another one.

    Turns run one at a time. Starting a turn while another one is open raises RuntimeError.

    Args:
        stream: starts a reply, as `SyncClient.stream` does.
        system: the system message; None uses the card's default. It can be changed between turns.
        defaults: generation options for every turn; the options of a turn override them.
    """

    def __init__(
        self, stream: Callable[..., SyncReplyStream], system: str | None = None, **defaults: Unpack[GenerationOptions]
    ) -> None:
        super().__init__(system)
        self._stream = stream
        self._defaults = defaults

    def send(self, text: str, **options: Unpack[GenerationOptions]) -> Reply:
        """Send the user's next message and return the whole reply."""
        with self.stream(text, **options) as stream:
            for _ in stream:
                pass
        return stream.reply

    def stream(self, text: str, **options: Unpack[GenerationOptions]) -> SyncReplyStream:
        """Send the user's next message and stream the reply.

        The turn joins the history only if the stream is read to its end.
        """
        self._check_closed()
        question = Message("user", text)
        merged: GenerationOptions = {**self._defaults, **options}
        stream = self._stream(messages=(*self.history, question), **merged)
        stream.on_complete(lambda reply: self._append(question, reply))
        self._open_stream = weakref.ref(stream)
        return stream
