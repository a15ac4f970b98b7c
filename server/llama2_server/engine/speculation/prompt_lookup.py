"""Prompt lookup: guess the next tokens of a reply from an earlier place of the prompt or the reply that ends alike.

Source: Saxena 2023 (prompt lookup decoding). Replies that quote, edit or summarize their prompt repeat long parts of
it.
"""

from collections.abc import Iterable

MAX_MATCH_TOKENS = 12  # tokens before a place that are compared; a longer match is not more certain
MAX_PLACES = 8  # places that are compared, so that a step's time does not depend on the text


class PromptLookup:
    """The tokens of one sequence, and an index of the places where each pair of tokens occurs."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._token_ids: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # by pair of tokens: index of the token after its last occurrence
        self._earlier: list[int] = []  # by such an index: the one of the occurrence before, or 0
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Add the next token of the sequence."""
        token_ids = self._token_ids
        if len(token_ids) < 2:
            self._earlier.append(0)
        else:
            pair = (token_ids[-2], token_ids[-1])
            self._earlier.append(self._latest.get(pair, 0))
            self._latest[pair] = len(token_ids)
        token_ids.append(token_id)

    def find(self) -> tuple[int, int]:
        """Return the index after the earlier place that ends most like the sequence, and the number of equal tokens.

        Of equally good places, it is the latest. The number is 0 if even the last two tokens are new.
        """
        best, longest = 0, 0
        if len(self._token_ids) < 2:
            return best, longest
        place = self._latest.get((self._token_ids[-2], self._token_ids[-1]), 0)
        for _ in range(MAX_PLACES):
            if place == 0 or longest == MAX_MATCH_TOKENS:
                break
            matching = self._matching(place)
            if matching > longest:
                best, longest = place, matching
            place = self._earlier[place]
        return best, longest

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
