"""Stop sequences in a stream of text."""


class StopMatcher:
    """Cuts a text before the stop sequence that is completed first, however the text is split into pieces.

    Of several that end at the same character the one that starts first counts. Only text that may still become part of
    a stop sequence is held back, and no part of one is ever let through.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Raises ValueError for an empty stop sequence: it would end each text before it begins."""
        if not all(stops):
            raise ValueError("a stop sequence must not be empty")
        self._stops = stops
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that is safe to send now that `text` has come; nothing after a match."""
        if self.matched or not self._stops:
            return "" if self.matched else text
        text = self._held + text
        cut = self._first_match(text)
        self.matched = cut is not None
        if cut is None:
            cut = len(text) - self._unfinished(text)
        self._held = "" if self.matched else text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Where the stop sequence starts that is completed first."""
        starts = ((text.find(stop), len(stop)) for stop in self._stops)
        first = min(((start + length, start) for start, length in starts if start >= 0), default=None)
        return None if first is None else first[1]

    def _unfinished(self, text: str) -> int:
        """The length of the longest end of the text that a stop sequence begins with."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
