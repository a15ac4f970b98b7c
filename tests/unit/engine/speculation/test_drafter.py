"""Guesses of the next tokens, and what a sequence learns from them."""

from llama2_server.engine.speculation.drafter import FIRST_CHANCES, MAX_DRAFT_TOKENS, NO_DRAFT, Drafter
from llama2_server.engine.speculation.prompt_lookup import MAX_MATCH_TOKENS, PromptLookup

END_IDS = frozenset({2})


def drafter(token_ids: list[int]) -> Drafter:
    return Drafter(token_ids, END_IDS)


def test_the_tokens_after_the_longest_match_are_guessed() -> None:
    """Of several places that end like the sequence, the most similar one counts, and then the latest."""
    lookup = PromptLookup([7, 8, 9, 50, 8, 9, 60, 6, 8, 9, 70, 7, 8, 9])
    assert lookup.find() == (3, 3)
    assert lookup.following(3, 4) == [50, 8, 9, 60]
    assert PromptLookup([8, 9, 50, 1, 8, 9, 60, 5, 8, 9]).find() == (6, 2)


def test_a_single_equal_token_counts_after_pairs() -> None:
    """It is the place next to the expected one, and without one the latest."""
    token_ids = [8, 3, 8, 4, 6, 8, 5, 1, 9, 8]
    assert PromptLookup(token_ids).find() == (6, 1)
    assert [PromptLookup(token_ids).find(expected)[0] for expected in (1, 2, 3, 4, 5, 9)] == [1, 3, 3, 3, 6, 6]
    assert PromptLookup([*token_ids, 8, 3]).find(6) == (2, 2)


def test_new_tokens_have_no_guess() -> None:
    """Without an equal token and an expected place there is no draft."""
    for token_ids in ([], [8], [8, 9], [1, 2, 3, 4, 5]):
        assert PromptLookup(token_ids).find() == (0, 0)
        assert drafter(token_ids).guess() == NO_DRAFT
    assert PromptLookup([1, 2, 3, 4, 5]).find(3) == (3, 0)
    assert PromptLookup([1, 2, 3, 4, 5]).find(5) == (0, 0)


def test_the_passage_goes_on_after_replaced_tokens() -> None:
    """After tokens that replace others of the passage, its tokens behind them are guessed, also after several steps."""
    passage = list(range(10, 40))
    found = drafter([*passage, 10, 11])
    draft = found.guess()
    found.learn(draft, [12, 13, 99])  # replaces 14
    draft = found.guess()
    assert (draft.token_ids[:3], draft.matching) == ([15, 16, 17], 0)
    found.learn(draft, [98])  # replaces 15
    draft = found.guess()
    assert draft.token_ids[:3] == [16, 17, 18]
    found.learn(draft, [16, 17])
    assert found.guess().matching == 2


def test_a_long_match_is_compared_up_to_a_limit() -> None:
    """A step's time does not depend on the length of the text."""
    token_ids = list(range(3, 103))
    assert PromptLookup(token_ids + token_ids).find() == (100, MAX_MATCH_TOKENS)


def test_a_place_near_the_end_repeats_itself() -> None:
    """A text that repeats a few tokens is guessed as far as any other."""
    draft = drafter([5, 6, 7, 5, 6, 7, 5, 6]).guess()
    assert draft.token_ids == [7, 5, 6] * 5
    assert len(draft.token_ids) == MAX_DRAFT_TOKENS


def test_nothing_is_guessed_after_an_end_token() -> None:
    """The end-of-sequence token ends a draft, and is no guess itself: nothing follows it."""
    assert drafter([5, 6, 7, 2, 9, 5, 6]).guess().token_ids == [7]
    assert drafter([5, 6, 2, 9, 5, 6]).guess().token_ids == []


def test_a_limit_shortens_the_draft() -> None:
    """Guesses beyond the last allowed token are useless."""
    assert drafter([5, 6, 7, 8, 9, 5, 6]).guess(2).token_ids == [7, 8]
    assert drafter([5, 6, 7, 8, 9, 5, 6]).guess(0) == NO_DRAFT


def test_misses_lower_the_chance_of_equal_matches_only() -> None:
    """A sequence learns for each length of the match; also from guesses that no step has checked."""
    found = drafter([5, 6, 7, 8, 9])
    first: list[float] = []
    for other in range(20):
        found.learn(NO_DRAFT, [5, 6])
        draft = found.guess()
        first.append(draft.chances[0])
        found.learn(draft, [100 + other, 200 + other])
    assert first == sorted(first, reverse=True)
    assert first[-1] < 0.05 < first[0]
    found.learn(NO_DRAFT, [9, 8, 5, 6, 119])
    assert found.guess().matching == 3
    assert found.guess().chances[0] == FIRST_CHANCES[3]


def test_hits_raise_the_chance() -> None:
    """After enough right guesses, nearly the whole draft is expected to be right."""
    passage = list(range(3, 60))
    found = drafter(passage + passage[:2])
    before = found.guess().chances[-1]
    for start in range(2, 50, 8):
        draft = found.guess()
        assert draft.token_ids[:8] == passage[start : start + 8]
        found.learn(draft, passage[start : start + 8])
    assert found.guess(7).chances[-1] > 0.8 > before


def test_chances_of_a_draft_never_increase() -> None:
    """Each guess needs all guesses before it, so its chance is at most theirs."""
    chances = drafter([*range(3, 40), 3, 4]).guess().chances
    assert list(chances) == sorted(chances, reverse=True)


def test_one_guess_is_compared_while_the_chance_is_low() -> None:
    """A text that does not repeat itself costs little; hits after it bring whole drafts back."""
    passage = list(range(10, 40))
    found = drafter([*passage, 5])
    for other in range(30):
        found.learn(found.guess(), [100 + other, 5])  # 5 occurred before, with another token after it
    assert len(found.guess().token_ids) == 1
    found.learn(NO_DRAFT, passage[:3])
    assert found.guess().token_ids == passage[3 : 3 + MAX_DRAFT_TOKENS]
