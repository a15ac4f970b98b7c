"""Incremental decoding against SentencePiece's decoding of everything at once."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.tokenizer import Tokenizer

FIRST_BYTE = 3  # <0x00>; <unk>, <s> and </s> come before
# Bytes of emoji, of CJK, of impossible and over-long sequences, of surrogates and of U+FFFD itself.
BYTES = st.sampled_from(
    [0x20, 0x41, 0x80, 0x98, 0x9F, 0xA6, 0xBD, 0xBF, 0xC0, 0xE0, 0xE4, 0xED, 0xEF, 0xF0, 0xF4, 0xFF]
)
TOKENS = st.one_of(st.integers(0, 599), BYTES.map(lambda byte: FIRST_BYTE + byte))
SEQUENCES = st.lists(TOKENS, max_size=40)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["🦙 👩‍👩‍👧", "今天天气很好。", " x", "\ufffd"]
)


def deltas(tokenizer: Tokenizer, ids: list[int], *, keep_leading_space: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, keep_leading_space)
    return [*map(detokenizer.decode, ids), detokenizer.flush()]


@given(ids=SEQUENCES)
def test_deltas_join_to_what_sentencepiece_decodes(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any tokens at all: pieces, control tokens, unknown ones, bytes that make characters and bytes that do not."""
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=SEQUENCES)
def test_a_continuation_keeps_its_leading_space(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Behind a prompt the text is what the prompt and the tokens decode to, less the prompt."""
    context = tokenizer.encode_raw("Once upon")
    whole = tokenizer.decode(context + ids)
    assert "".join(deltas(tokenizer, ids, keep_leading_space=True)) == whole.removeprefix("Once upon")


@given(text=TEXTS)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """What was encoded is decoded, and no delta ends inside a character."""
    ids = tokenizer.encode_raw(text)
    parts = deltas(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert ("\ufffd" in "".join(parts)) == ("\ufffd" in text)


@pytest.mark.parametrize("character", ["é", "今", "🦙", "\ufffd"])
def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer, character: str) -> None:
    """Nothing is sent for the first bytes of a character, and all of it with the last."""
    ids = [FIRST_BYTE + byte for byte in character.encode()]
    assert deltas(tokenizer, ids) == [*[""] * (len(ids) - 1), character, ""]


def test_a_bad_byte_is_sent_at_once(tokenizer: Tokenizer) -> None:
    """As soon as bytes cannot become a character they are U+FFFD, one for each, and the next may start anew."""
    ids = [FIRST_BYTE + byte for byte in (0xF0, 0x9F, 0x41, 0xC3, 0xA9, 0xE4)]
    assert deltas(tokenizer, ids) == ["", "", "\ufffd\ufffdA", "", "é", "", "\ufffd"]


def test_a_piece_breaks_a_run_of_bytes(tokenizer: Tokenizer) -> None:
    """Half a character in front of a piece is U+FFFD: the piece's delta begins with it."""
    piece = tokenizer.encode_raw("llama")[1:]
    parts = deltas(tokenizer, [FIRST_BYTE + 0xF0, *piece])
    assert parts[0] == ""
    assert "".join(parts) == "\ufffd llama"


def test_only_the_first_space_is_dropped(tokenizer: Tokenizer) -> None:
    """A reply that begins with several spaces loses one, in whichever pieces they come."""
    piece_ids = {tokenizer.decode([1, 5, token_id])[1:]: token_id for token_id in range(tokenizer.vocab_size)}
    space, word = piece_ids[" "], tokenizer.encode_raw("llama")[1:]
    assert "".join(deltas(tokenizer, [space, *word])) == tokenizer.decode([space, *word]) == " llama"


def test_control_tokens_are_silent(tokenizer: Tokenizer) -> None:
    """<s> and </s> have no text, and the space behind one is still the first."""
    assert "".join(deltas(tokenizer, [1, *tokenizer.encode_raw("llama"), 2])) == "llama"
    assert unicodedata.name("".join(deltas(tokenizer, [0])).strip()) == "DOUBLE QUESTION MARK"


def test_rows_beyond_the_vocabulary_are_silent(tokenizer: Tokenizer) -> None:
    """A padded embedding can yield ids that the tokenizer does not know: they have no text and break a run of bytes."""
    assert deltas(tokenizer, [600, FIRST_BYTE + 0xF0, 10_000]) == ["", "", "\ufffd", ""]


def test_a_token_costs_the_same_however_many_came_before(tokenizer: Tokenizer) -> None:
    """The state is at most three bytes, also after a long run of them."""
    detokenizer = Detokenizer(tokenizer, keep_leading_space=False)
    for index in range(3000):
        detokenizer.decode(FIRST_BYTE + (0xF0, 0x9F, 0xA6, 0x99, 0xF0, 0xF0)[index % 6])
        assert len(detokenizer._bytes) <= 3
