"""Stop sequences against a reference that sees the whole text at once."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama2_server.engine.text.stop_sequences import StopMatcher

# Two letters make overlaps, repeats and near misses likely.
LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)


def cut(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the stop sequence that is completed first; None without one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def longest_start_of_a_stop(text: str, stops: tuple[str, ...]) -> int:
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


@given(chunks=st.lists(LETTERS, max_size=6), stops=STOPS)
@example(chunks=["ab", "abc"], stops=("abc",))
@example(chunks=["aab"], stops=("aab", "ab", "b"))
@example(chunks=["abab", "ba"], stops=("ababb", "ba"))
def test_any_chunking_is_cut_at_the_same_place(chunks: list[str], stops: tuple[str, ...]) -> None:
    """What is sent is the text up to the stop sequence completed first, or all of it."""
    matcher = StopMatcher(stops)
    sent = "".join(map(matcher.push, chunks))
    expected = cut("".join(chunks), stops)
    assert matcher.matched == (expected is not None)
    assert sent + matcher.flush() == ("".join(chunks) if expected is None else expected)


@given(chunks=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_only_what_may_become_a_stop_is_held_back(chunks: list[str], stops: tuple[str, ...]) -> None:
    """After each piece all is sent but the longest end that a stop sequence begins with."""
    matcher, text, sent = StopMatcher(stops), "", ""
    for chunk in chunks:
        text += chunk
        sent += matcher.push(chunk)
        if matcher.matched:
            break
        assert sent == text[: len(text) - longest_start_of_a_stop(text, stops)]


@given(text=LETTERS, stops=STOPS)
def test_no_part_of_a_stop_leaks(text: str, stops: tuple[str, ...]) -> None:
    """Letter by letter, what has been sent is always the beginning of the final text."""
    matcher, sent = StopMatcher(stops), ""
    final = cut(text, stops)
    for letter in text:
        sent += matcher.push(letter)
        assert (text if final is None else final).startswith(sent)


def test_nothing_comes_after_a_match() -> None:
    """Text behind a stop sequence is dropped, in the same piece and in later ones."""
    matcher = StopMatcher(("END",))
    assert [matcher.push("an END, or"), matcher.push(" more"), matcher.flush()] == ["an ", "", ""]


def test_the_longer_of_two_that_end_together_counts() -> None:
    """Of stop sequences completed by the same character, the one that starts first cuts."""
    assert StopMatcher(("world", "hello world")).push("oh, hello world") == "oh, "


def test_the_one_completed_first_counts() -> None:
    """A stop sequence that starts later but is complete earlier cuts."""
    assert StopMatcher(("abcde", "bc")).push("abcde") == "a"


def test_an_empty_stop_is_refused() -> None:
    """It would end each text before it begins."""
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(("fine", ""))
