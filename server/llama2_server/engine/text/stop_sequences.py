"""Find stop sequences in streamed text."""


class StopMatcher:
    """Cuts a text before the stop sequence that is completed first, for any split of the text into pieces.

    If several stop sequences end at the same character, the text is cut at the earliest start. Only text that may
    become part of a stop sequence is held back, and no part of the matched stop sequence is returned.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Raise ValueError for an empty stop sequence, which would match before any text."""
        if not all(stops):
            raise ValueError("stop: a stop sequence must not be empty")
        self._stops = stops
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Add `text` and return the text that is now safe to send; an empty string after a match."""
        if self.matched or not self._stops:
            return "" if self.matched else text
        text = self._held + text
        cut = self._first_match(text)
        self.matched = cut is not None
        if cut is None:
            cut = len(text) - self._partial_match_length(text)
        self._held = "" if self.matched else text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return the text held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Return the start of the stop sequence that is completed first, or None."""
        starts = ((text.find(stop), len(stop)) for stop in self._stops)
        first = min(((start + length, start) for start, length in starts if start >= 0), default=None)
        return None if first is None else first[1]

    def _partial_match_length(self, text: str) -> int:
        """Return the length of the longest suffix of the text that is a proper prefix of a stop sequence."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
