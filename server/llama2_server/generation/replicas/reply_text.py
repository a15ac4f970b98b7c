"""The text of a reply in progress."""

import asyncio
import time


class ReplyText:
    """Text that grows while readers wait for more, and can be computed again from its start by another server."""

    def __init__(self) -> None:
        self._deltas: list[str] = []
        self._expected = ""  # the known text that comes again before new text
        self.changed = asyncio.Event()
        """Set at the next change of the text or of the reply's state."""
        self.first_at = 0.0
        """When the first text was added, from time.monotonic; 0 before."""

    @property
    def value(self) -> str:
        """The text so far."""
        return "".join(self._deltas)

    @property
    def repeats(self) -> bool:
        """Whether known text is still expected again."""
        return bool(self._expected)

    def after(self, deltas: int) -> tuple[str, int]:
        """Return the text after this number of deltas, and the number of all deltas."""
        return "".join(self._deltas[deltas:]), len(self._deltas)

    def add(self, text: str) -> bool:
        """Add text, without the part that repeats the known text; return False if that part differs."""
        if self._expected:
            known, self._expected = self._expected[: len(text)], self._expected[len(text) :]
            if not text.startswith(known):
                return False
            text = text[len(known) :]
        if text:
            self.first_at = self.first_at or time.monotonic()
            self._deltas.append(text)
            self.notify()
        return True

    def repeat(self) -> None:
        """Expect the text from its start again."""
        self._expected = self.value

    def notify(self) -> None:
        """Set `changed`."""
        self.changed.set()
        self.changed = asyncio.Event()
