"""Stop sequences, compared with a reference that reads the whole text at once."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama2_server.engine.text.stop_sequences import StopMatcher

# Two letters make overlaps, repeats and near misses likely.
LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)


def cut(text: str, stops: tuple[str, ...]) -> str | None:
    """Return the text before the stop sequence that is completed first, or None without one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def longest_partial_match(text: str, stops: tuple[str, ...]) -> int:
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


@given(chunks=st.lists(LETTERS, max_size=6), stops=STOPS)
@example(chunks=["ab", "abc"], stops=("abc",))
@example(chunks=["aab"], stops=("aab", "ab", "b"))
@example(chunks=["abab", "ba"], stops=("ababb", "ba"))
def test_the_cut_does_not_depend_on_the_chunks(chunks: list[str], stops: tuple[str, ...]) -> None:
    """The returned text is the text before the stop sequence completed first, or the whole text."""
    matcher = StopMatcher(stops)
    sent = "".join(map(matcher.push, chunks))
    expected = cut("".join(chunks), stops)
    assert matcher.matched == (expected is not None)
    assert sent + matcher.flush() == ("".join(chunks) if expected is None else expected)


@given(chunks=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_only_partial_matches_are_held_back(chunks: list[str], stops: tuple[str, ...]) -> None:
    """After each piece, only the longest suffix that is a prefix of a stop sequence is held back."""
    matcher, text, sent = StopMatcher(stops), "", ""
    for chunk in chunks:
        text += chunk
        sent += matcher.push(chunk)
        if matcher.matched:
            break
        assert sent == text[: len(text) - longest_partial_match(text, stops)]


@given(text=LETTERS, stops=STOPS)
def test_no_part_of_a_stop_sequence_is_returned(text: str, stops: tuple[str, ...]) -> None:
    """Letter by letter, the returned text is always a prefix of the final text."""
    matcher, sent = StopMatcher(stops), ""
    final = cut(text, stops)
    for letter in text:
        sent += matcher.push(letter)
        assert (text if final is None else final).startswith(sent)


def test_no_text_is_returned_after_a_match() -> None:
    """Text after a stop sequence is dropped, in the same piece and in later pieces."""
    matcher = StopMatcher(("END",))
    assert [matcher.push("an END, or"), matcher.push(" more"), matcher.flush()] == ["an ", "", ""]


def test_the_longer_of_two_matches_with_one_end_counts() -> None:
    """If one character completes several stop sequences, the text is cut at the earliest start."""
    assert StopMatcher(("world", "hello world")).push("oh, hello world") == "oh, "


def test_the_first_completed_match_counts() -> None:
    """A stop sequence that starts later but is completed earlier counts."""
    assert StopMatcher(("abcde", "bc")).push("abcde") == "a"


def test_an_empty_stop_sequence_is_rejected() -> None:
    """An empty stop sequence would match before any text."""
    with pytest.raises(ValueError, match="stop: a stop sequence must not be empty"):
        StopMatcher(("fine", ""))
