"""Prompt lookup: guess the next tokens of a reply from an earlier place of the prompt or the reply that ends alike.

Source: Saxena 2023 (prompt lookup decoding). Replies that quote, edit or summarize their prompt repeat long parts of
it.
"""

from bisect import bisect_left
from collections.abc import Iterable

MAX_MATCH_TOKENS = 12  # tokens before a place that are compared; a longer match is not more certain
MAX_PLACES = 8  # places that are compared, so that a step's time does not depend on the text


class PromptLookup:
    """The tokens of one sequence, and an index of the places where each token and each pair of tokens occurs."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._token_ids: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # by pair of tokens: index of the token after its last occurrence
        self._earlier: list[int] = []  # by such an index: the one of the occurrence before, or 0
        # By token: the indexes after its occurrences, except for the last token of the sequence.
        self._places: dict[int, list[int]] = {}
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Add the next token of the sequence."""
        token_ids = self._token_ids
        if token_ids:
            self._places.setdefault(token_ids[-1], []).append(len(token_ids))
        if len(token_ids) < 2:
            self._earlier.append(0)
        else:
            pair = (token_ids[-2], token_ids[-1])
            self._earlier.append(self._latest.get(pair, 0))
            self._latest[pair] = len(token_ids)
        token_ids.append(token_id)

    def find(self, expected: int = 0) -> tuple[int, int]:
        """Return the index after the earlier place that ends most like the sequence, and the number of equal tokens.

        Of places with equally many tokens, two or more, it is the latest. If only the last token occurred before, it is
        the place next to the index `expected`. If the last token is new, it is `expected` with 0 equal tokens. The
        index is 0 if there is no such place.
        """
        if len(self._token_ids) < 2:
            return 0, 0
        best, longest = 0, 0
        place = self._latest.get((self._token_ids[-2], self._token_ids[-1]), 0)
        for _ in range(MAX_PLACES):
            if place == 0 or longest == MAX_MATCH_TOKENS:
                break
            matching = self._matching(place)
            if matching > longest:
                best, longest = place, matching
            place = self._earlier[place]
        if longest:
            return best, longest
        if places := self._places.get(self._token_ids[-1]):
            return _nearest(places, expected or len(self._token_ids)), 1
        return (expected if expected < len(self._token_ids) else 0), 0

    def following(self, place: int, count: int) -> list[int]:
        """Return `count` tokens from an index on; a place near the end repeats itself."""
        token_ids = self._token_ids[place : place + count]
        period = len(token_ids)
        while len(token_ids) < count:
            token_ids.append(token_ids[-period])
        return token_ids

    def _matching(self, place: int) -> int:
        """Return how many tokens before `place` equal the last tokens, at most MAX_MATCH_TOKENS."""
        token_ids = self._token_ids
        matching, limit = 2, min(place, MAX_MATCH_TOKENS)
        while matching < limit and token_ids[place - 1 - matching] == token_ids[-1 - matching]:
            matching += 1
        return matching


def _nearest(places: list[int], expected: int) -> int:
    """Return the place next to `expected`; of two at the same distance, the later one."""
    index = bisect_left(places, expected)
    around = places[max(0, index - 1) : index + 1]
    return min(reversed(around), key=lambda place: abs(place - expected))
