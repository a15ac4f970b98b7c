"""`tokenizer.json`, compared with transformers and with the `tokenizer.model` of the same vocabulary."""

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tests.support.checkpoints import VOCAB_SIZE, edit_tokenizer_json, pieces_of
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.stop_sequences import StopMatcher
from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer

FIRST_BYTE = 3  # <0x00>, after <unk>, <s> and </s>
TEXTS = 10_000
SPECIAL = re.compile("<unk>|</?s>")
ODD_PARTS = [
    "\n",
    "\t",
    "  ",
    "🦙",
    "今",
    "é",
    "e\u0301",
    "\u00a0",
    "\x00",
    "<",
    "</",
    "<0x0A>",
    "[INST]",
    "\U0010ffff",
    "1984",
]

IDS = st.lists(
    st.integers(0, VOCAB_SIZE - 1) | st.sampled_from([0x20, 0x41, 0xE4, 0xBB, 0x8A, 0xF0, 0x9F]).map(lambda b: 3 + b),
    max_size=20,
)


@pytest.fixture(scope="module")
def ours(saved: Path) -> Tokenizer:
    """Our tokenizer from tokenizer.json."""
    return Tokenizer(saved / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> LlamaTokenizer:
    """Transformers' tokenizer from tokenizer.json alone."""
    directory = tmp_path_factory.mktemp("reference")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, directory)
    tokenizer: LlamaTokenizer = LlamaTokenizer.from_pretrained(directory)
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece(saved: Path) -> SentencePieceProcessor:
    """The same vocabulary, run by SentencePiece."""
    return SentencePieceProcessor(model_file=str(saved / "tokenizer.model"))


def read_by_transformers(path: Path) -> Any:
    """Return transformers' generic tokenizer, which uses each part of the file."""
    tokenizer: Any = PreTrainedTokenizerFast
    return tokenizer(tokenizer_file=str(path))


def random_texts(pieces: list[str], count: int = TEXTS) -> Iterator[str]:
    """Yield texts of pieces and odd parts, without names of special tokens."""
    chooser = random.Random(1)
    while count:
        parts = [chooser.choice(pieces if chooser.random() < 0.9 else ODD_PARTS) for _ in range(chooser.randrange(12))]
        if not SPECIAL.search(text := "".join(parts)):
            count -= 1
            yield text


def starts_with_space(text: str) -> bool:
    return text.startswith((" ", "\u2581"))  # a literal space symbol counts


def test_ids_equal_transformers_and_sentencepiece(
    saved: Path, ours: Tokenizer, reference: LlamaTokenizer, sentencepiece: SentencePieceProcessor
) -> None:
    """All texts have transformers' ids, and all that do not start with a space the ids of the tokenizer.model."""
    texts = list(random_texts(pieces_of(saved / "tokenizer.model")))
    expected: Any = reference(texts, add_special_tokens=False).input_ids
    assert [ours.encode_raw(text)[1:] for text in texts] == expected
    plain = [text for text in texts if not starts_with_space(text)]
    assert len(plain) > TEXTS // 3
    assert [ours.encode_raw(text)[1:] for text in plain] == sentencepiece.encode(plain)
    assert len({token_id for ids in expected for token_id in ids}) > VOCAB_SIZE // 4


def test_a_text_that_starts_with_a_space(ours: Tokenizer, sentencepiece: SentencePieceProcessor) -> None:
    """The documented difference: Metaspace adds no second space."""
    assert ours.encode_raw(" llama")[1:] == ours.encode_raw("llama")[1:] == sentencepiece.encode("llama")
    assert sentencepiece.encode(" llama") != sentencepiece.encode("llama")


def with_normalizers(document: dict[str, Any]) -> None:
    """Change the file to the form in which Llama-2 was published."""
    document["pre_tokenizer"] = None
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }


def test_the_published_form_equals_sentencepiece(
    saved: Path, tmp_path: Path, sentencepiece: SentencePieceProcessor
) -> None:
    """With the normalizers of Llama-2's first tokenizer.json, all texts have the ids of the tokenizer.model."""
    path = edit_tokenizer_json(saved, tmp_path, with_normalizers)
    ours, reference = Tokenizer(path), read_by_transformers(path)
    texts = list(random_texts(pieces_of(saved / "tokenizer.model"), 2000))
    found = [ours.encode_raw(text)[1:] for text in texts]
    assert found == sentencepiece.encode(texts)
    assert found == reference(texts, add_special_tokens=False).input_ids


def test_special_token_names_stay_text(ours: Tokenizer, sentencepiece: SentencePieceProcessor) -> None:
    """A client cannot end a turn with the text </s>."""
    text = "a</s><s>[INST] <unk> b"
    ids = ours.encode_raw(text)[1:]
    assert not {0, 1, 2} & set(ids)
    assert ids == sentencepiece.encode(text)
    assert ours.decode(ids) == text


def test_a_chat_has_the_ids_of_the_model_file(saved: Path, ours: Tokenizer) -> None:
    """The chat template gives the same ids with both files."""
    roles = ("system", "user", "assistant", "user")
    messages = [ChatMessage(role, f" {role} says 今天 🦙 </s>") for role in roles]
    assert ours.encode_chat(messages) == Tokenizer(saved / "tokenizer.model").encode_chat(messages)


def deltas(tokenizer: Tokenizer, ids: list[int], *, keep_leading_space: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, keep_leading_space)
    return [*map(detokenizer.decode, ids), detokenizer.flush()]


@given(ids=IDS)
def test_deltas_join_to_the_decoding_of_transformers(
    ours: Tokenizer, reference: LlamaTokenizer, ids: list[int]
) -> None:
    """The tokens are arbitrary, except that runs of bytes are valid UTF-8."""
    expected: Any = reference.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in expected:
        assert "".join(deltas(ours, ids)) == expected == ours.decode(ids)


@given(ids=IDS)
def test_invalid_bytes_are_decoded_like_sentencepiece(
    ours: Tokenizer, sentencepiece: SentencePieceProcessor, ids: list[int]
) -> None:
    """An invalid byte is U+FFFD, and the valid characters of its run stay, if no special token is in the run."""
    ids = [5, *(token_id for token_id in ids if token_id >= FIRST_BYTE)]
    assert "".join(deltas(ours, ids)) == sentencepiece.decode(ids)


@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_encoded_text_is_decoded(ours: Tokenizer, reference: LlamaTokenizer, text: str) -> None:
    """A reply is the text, as transformers decodes it, and no delta ends inside a character."""
    ids = ours.encode_raw(text)
    parts = deltas(ours, ids)
    assert "".join(parts) == reference.decode(ids, skip_special_tokens=True)
    assert ("\ufffd" in "".join(parts)) == ("\ufffd" in text)
    assert "".join(deltas(ours, ours.encode_raw("a" + text)[1:])) == "a" + text.replace("\u2581", " ")


def test_a_continuation_keeps_its_leading_space(ours: Tokenizer) -> None:
    """After a prompt, the first space of the text is part of the reply."""
    assert "".join(deltas(ours, ours.encode_raw("llama")[1:], keep_leading_space=True)) == " llama"


def test_a_leading_space_byte_is_dropped_like_transformers_drops_it(ours: Tokenizer, reference: LlamaTokenizer) -> None:
    """SentencePiece keeps a space that is a byte token; the tokenizers library strips it."""
    ids = [FIRST_BYTE + 0x20, FIRST_BYTE + 0x20, FIRST_BYTE + 0x41]
    assert "".join(deltas(ours, ids)) == reference.decode(ids) == " A"


def test_a_character_is_returned_with_its_last_byte(ours: Tokenizer) -> None:
    """The first bytes of a character give no text; the last byte gives the character."""
    ids = [FIRST_BYTE + byte for byte in "🦙".encode()]
    assert deltas(ours, ids) == ["", "", "", "🦙", ""]


@pytest.mark.parametrize("silent", [0, 1, 2, VOCAB_SIZE, 40_000])
def test_tokens_without_text_do_not_split_a_character(ours: Tokenizer, reference: LlamaTokenizer, silent: int) -> None:
    """As in transformers, special tokens are removed before the bytes are joined."""
    first, *others = [FIRST_BYTE + byte for byte in "今".encode()]
    ids = [first, silent, *others]
    assert deltas(ours, ids) == ["", "", "", "今", ""]
    if silent < VOCAB_SIZE:
        assert reference.decode(ids, skip_special_tokens=True) == "今"


def test_stop_sequences_end_a_text(ours: Tokenizer) -> None:
    """A stop sequence is found although its characters are bytes of several tokens."""
    matcher = StopMatcher(("🦙!",))
    text = "".join(matcher.push(delta) for delta in deltas(ours, ours.encode_raw("a llama 🦙! walks")))
    assert (text, matcher.matched) == ("a llama ", True)


def add_tokens(document: dict[str, Any]) -> None:
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"] += [
        {"id": VOCAB_SIZE - 1, "content": "<tool>", "special": False, **fields},
        {"id": VOCAB_SIZE, "content": "<pad>", "special": True, **fields},
    ]
    vocab = document["model"]["vocab"]
    del vocab[next(piece for piece, token_id in vocab.items() if token_id == VOCAB_SIZE - 1)]
    document["model"]["merges"] = [pair for pair in document["model"]["merges"] if "".join(pair) in vocab]


def test_added_tokens(saved: Path, tmp_path: Path) -> None:
    """An added token that is not special is one token, as in transformers; a special one needs no row and is silent."""
    path = edit_tokenizer_json(saved, tmp_path, add_tokens)
    ours, reference = Tokenizer(path), read_by_transformers(path)
    ids = ours.encode_raw("a<tool>b<pad>")
    assert VOCAB_SIZE - 1 in ids
    assert VOCAB_SIZE not in ids
    assert ours.vocab_size == VOCAB_SIZE
    assert "".join(deltas(ours, [*ids, VOCAB_SIZE])) == reference.decode(ids, skip_special_tokens=True)


def limit_lengths(document: dict[str, Any]) -> None:
    """Set what training scripts often save: texts are cut, and short ones are padded."""
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }


def test_saved_lengths_of_a_training_do_not_count(saved: Path, tmp_path: Path, ours: Tokenizer) -> None:
    """A text is neither cut nor padded."""
    limited = Tokenizer(edit_tokenizer_json(saved, tmp_path, limit_lengths))
    for text in ("a", "a text that has more than four tokens, as most texts"):
        assert limited.encode_raw(text) == ours.encode_raw(text)
