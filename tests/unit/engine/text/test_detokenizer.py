"""Incremental decoding, compared with SentencePiece's decoding of all tokens at once."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.tokenizer import Tokenizer

FIRST_BYTE = 3  # <0x00>, after <unk>, <s> and </s>
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
def test_deltas_join_to_the_decoding_of_sentencepiece(tokenizer: Tokenizer, ids: list[int]) -> None:
    """The tokens are arbitrary: pieces, control tokens, unknown tokens, and bytes of valid and invalid characters."""
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=SEQUENCES)
def test_a_continuation_keeps_its_leading_space(tokenizer: Tokenizer, ids: list[int]) -> None:
    """After a prompt, the text is the decoding of prompt and tokens without the prompt."""
    context = tokenizer.encode_raw("Once upon")
    whole = tokenizer.decode(context + ids)
    assert "".join(deltas(tokenizer, ids, keep_leading_space=True)) == whole.removeprefix("Once upon")


@given(text=TEXTS)
def test_encoded_text_is_decoded(tokenizer: Tokenizer, text: str) -> None:
    """Encoding and decoding restore the text, and no delta ends inside a character."""
    ids = tokenizer.encode_raw(text)
    parts = deltas(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert ("\ufffd" in "".join(parts)) == ("\ufffd" in text)


@pytest.mark.parametrize("character", ["é", "今", "🦙", "\ufffd"])
def test_a_character_is_returned_with_its_last_byte(tokenizer: Tokenizer, character: str) -> None:
    """The first bytes of a character give no text; the last byte gives the character."""
    ids = [FIRST_BYTE + byte for byte in character.encode()]
    assert deltas(tokenizer, ids) == [*[""] * (len(ids) - 1), character, ""]


def test_an_invalid_byte_is_returned_immediately(tokenizer: Tokenizer) -> None:
    """Each byte that cannot become part of a character is U+FFFD, and the next byte may start a character."""
    ids = [FIRST_BYTE + byte for byte in (0xF0, 0x9F, 0x41, 0xC3, 0xA9, 0xE4)]
    assert deltas(tokenizer, ids) == ["", "", "\ufffd\ufffdA", "", "é", "", "\ufffd"]


def test_a_piece_ends_a_run_of_bytes(tokenizer: Tokenizer) -> None:
    """An incomplete character before a piece becomes U+FFFD at the start of the piece's delta."""
    piece = tokenizer.encode_raw("llama")[1:]
    parts = deltas(tokenizer, [FIRST_BYTE + 0xF0, *piece])
    assert parts[0] == ""
    assert "".join(parts) == "\ufffd llama"


def test_only_the_first_space_is_dropped(tokenizer: Tokenizer) -> None:
    """A reply that starts with several spaces loses one, for any split of the spaces into pieces."""
    piece_ids = {tokenizer.decode([1, 5, token_id])[1:]: token_id for token_id in range(tokenizer.vocab_size)}
    space, word = piece_ids[" "], tokenizer.encode_raw("llama")[1:]
    assert "".join(deltas(tokenizer, [space, *word])) == tokenizer.decode([space, *word]) == " llama"


def test_control_tokens_are_silent(tokenizer: Tokenizer) -> None:
    """<s> and </s> have no text, and a space after them is still dropped as the first."""
    assert "".join(deltas(tokenizer, [1, *tokenizer.encode_raw("llama"), 2])) == "llama"
    assert unicodedata.name("".join(deltas(tokenizer, [0])).strip()) == "DOUBLE QUESTION MARK"


def test_rows_beyond_the_vocabulary_are_silent(tokenizer: Tokenizer) -> None:
    """A padded embedding can give ids beyond the tokenizer's; they have no text and end a run of bytes."""
    assert deltas(tokenizer, [600, FIRST_BYTE + 0xF0, 10_000]) == ["", "", "\ufffd", ""]


def test_the_state_does_not_grow(tokenizer: Tokenizer) -> None:
    """The state is at most three bytes, even after a long run of bytes, so each token takes the same time."""
    detokenizer = Detokenizer(tokenizer, keep_leading_space=False)
    for index in range(3000):
        detokenizer.decode(FIRST_BYTE + (0xF0, 0x9F, 0xA6, 0x99, 0xF0, 0xF0)[index % 6])
        assert len(detokenizer._bytes) <= 3
