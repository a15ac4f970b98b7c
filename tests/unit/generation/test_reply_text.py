"""The text of a reply that another server may compute again."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llama2_server.generation.replicas.reply_text import ReplyText

TEXT = "Once upon a time, a fox 🦊 lived by the sea."
cuts = st.lists(st.integers(0, len(TEXT)), max_size=8)


def pieces(positions: list[int]) -> list[str]:
    """Return the text, cut at these positions."""
    ends = [0, *sorted(positions), len(TEXT)]
    return [TEXT[start:end] for start, end in pairwise(ends)]


@given(known=st.integers(0, len(TEXT)), positions=cuts)
def test_a_repeated_text_continues_after_the_known_text(known: int, positions: list[int]) -> None:
    """However both servers cut it."""
    text = ReplyText()
    text.add(TEXT[:known])
    text.repeat()
    assert all(text.add(piece) for piece in pieces(positions))
    assert (text.value, text.repeats) == (TEXT, False)


@given(known=st.integers(1, len(TEXT)), data=st.data())
def test_a_different_text_is_never_added(known: int, data: st.DataObject) -> None:
    """A difference in the known text is found, however the text is cut, and nothing of that piece is added."""
    text = ReplyText()
    text.add(TEXT[:known])
    text.repeat()
    wrong = data.draw(st.integers(0, known - 1))
    positions = data.draw(cuts)
    parts = [part for part in pieces(positions) if part]
    seen = 0
    for part in parts:
        seen += len(part)
        if seen > wrong:
            at = len(part) - (seen - wrong)
            assert not text.add(part[:at] + "X" + part[at + 1 :])
            break
        assert text.add(part)
    assert text.value == TEXT[:known]


def test_a_shorter_text_is_noticed() -> None:
    """A text that ends before the known text has not repeated it."""
    text = ReplyText()
    text.add("Once upon")
    text.repeat()
    assert text.add("Once")
    assert text.repeats


def test_a_reader_gets_each_delta_once() -> None:
    """Several deltas are one text for a slow reader."""
    text = ReplyText()
    assert text.after(0) == ("", 0)
    text.add("Once ")
    text.add("upon ")
    assert text.after(0) == ("Once upon ", 2)
    text.add("a time")
    assert text.after(2) == ("a time", 3)
