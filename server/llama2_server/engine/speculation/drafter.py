"""The drafts of one sequence, and what it learns from them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from llama2_server.engine.speculation.prompt_lookup import MAX_MATCH_TOKENS, PromptLookup

MAX_DRAFT_TOKENS = 15
# By number of equal tokens before a guess: its chance, before the sequence has learned its own.
FIRST_CHANCES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.7, 0.8, 0.85, 0.88, 0.9, 0.9, 0.92, 0.92)
MIN_WEIGHT = 1 / 8  # of a new observation; an observation that is 16 later counts about a tenth
MAX_CHANCE = 0.99
MIN_CHANCE = 0.05  # of a first guess: below it, steps hardly ever check guesses, so one is enough to learn from


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses of the next tokens."""

    token_ids: Sequence[int] = ()
    chances: Sequence[float] = ()
    """By guess: the chance that it and all guesses before it are right."""
    matching: int = 0
    """Number of equal tokens before the first guess."""
    place: int = 0
    """Index of the first guess in the tokens of the sequence."""


NO_DRAFT = Draft()


class Drafter:
    """Guesses the next tokens of one sequence, and learns how often its guesses are right.

    A guess after a longer match is more often right, so there is one chance for each length of the match. A sequence
    learns from each guess, also from one without a row: the sampled token shows whether they were right.

    After a wrong guess, the reply is expected to go on behind it: an edit often replaces one word of a passage. This
    decides between the places after a single equal token, and is the guess if there is none.
    """

    def __init__(self, token_ids: Iterable[int], end_ids: frozenset[int]) -> None:
        """Index the prompt; `end_ids` end a sequence, so nothing after them is worth a guess."""
        self._lookup = PromptLookup(token_ids)
        self._end_ids = end_ids
        self._chances = list(FIRST_CHANCES)
        self._observations = [1] * len(FIRST_CHANCES)
        self._expected = 0  # index of the next token of the passage that the reply repeats; 0 before the first one

    def guess(self, limit: int = MAX_DRAFT_TOKENS) -> Draft:
        """Return guesses of the next tokens, at most `limit` and MAX_DRAFT_TOKENS."""
        if limit < 1:
            return NO_DRAFT
        place, matching = self._lookup.find(self._expected)
        if place == 0:
            return NO_DRAFT
        most = MAX_DRAFT_TOKENS if self._chances[matching] >= MIN_CHANCE else 1
        token_ids = self._lookup.following(place, min(limit, most))
        end = next((index for index, token_id in enumerate(token_ids) if token_id in self._end_ids), len(token_ids))
        chances = (self._chances[min(matching + index, MAX_MATCH_TOKENS)] for index in range(end))
        return Draft(token_ids[:end], list(accumulate(chances, mul)), matching, place)

    def learn(self, draft: Draft, sampled: Sequence[int]) -> None:
        """Add the tokens that followed the draft's place, and learn from them which guesses were right."""
        if draft.token_ids and sampled and draft.token_ids[0] == sampled[0]:
            self._expected = draft.place
        if self._expected:
            self._expected += len(sampled)
        for index, (guess, token_id) in enumerate(zip(draft.token_ids, sampled, strict=False)):
            self._observe(min(draft.matching + index, MAX_MATCH_TOKENS), right=guess == token_id)
            if guess != token_id:
                break
        for token_id in sampled:
            self._lookup.append(token_id)

    def _observe(self, matching: int, *, right: bool) -> None:
        self._observations[matching] += 1
        weight = max(MIN_WEIGHT, 1 / self._observations[matching])
        chance = self._chances[matching]
        self._chances[matching] = min(chance + weight * (right - chance), MAX_CHANCE)
