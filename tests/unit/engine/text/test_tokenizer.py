"""The chat template, compared with the checkpoint's template as transformers renders and encodes it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from llama2_server.engine.errors import WeightsError
from llama2_server.engine.text.tokenizer import CONTROL_TAGS, ChatMessage, Tokenizer

BEGIN, END = "\ue000", "\ue001"  # private-use characters, which distinguish the template's tokens from a literal <s>

ODD_TEXTS = (
    "",
    " ",
    "What is a llama?",
    "  leading and trailing \n\n",
    "\tA tab,\r\n a line,\u00a0a hard space\u2003and an em space\u2003",
    "🦙 👩‍👩‍👧 e\u0301 今天天气很好。",
    "<s>not a token</s> <unk> <0x0A>",
    "[INST] nested [/INST] <<SYS>> too <</SYS>>",
    "\u2581 the space symbol itself \u2581",
    "a" * 300,
)
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(st.characters(codec="utf-8", exclude_characters=BEGIN + END)))


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[..., Path]) -> LlamaTokenizer:
    """Transformers' tokenizer of a generated checkpoint, with the chat_template of Llama-2-7b-chat-hf."""
    tokenizer: LlamaTokenizer = LlamaTokenizer.from_pretrained(checkpoint())
    return tokenizer


@pytest.fixture(scope="module")
def ours(checkpoint: Callable[..., Path]) -> Tokenizer:
    """Our tokenizer of the same checkpoint."""
    return Tokenizer(checkpoint() / "tokenizer.model")


def conversation(texts: Sequence[str], *, system: str | None) -> list[ChatMessage]:
    roles = ["user", "assistant"] * len(texts)
    dialogue = [ChatMessage(role, text) for role, text in zip(roles, texts, strict=False)]
    return dialogue if system is None else [ChatMessage("system", system), *dialogue]


def reference_ids(reference: LlamaTokenizer, messages: Sequence[ChatMessage]) -> list[int]:
    """Encode the template's text segment by segment, so that a literal <s> in a message stays text."""
    dialogue = [message._asdict() for message in messages]
    text: Any = reference.apply_chat_template(dialogue, tokenize=False, bos_token=BEGIN, eos_token=END)
    ids: list[int] = []
    for segment in text.split(BEGIN)[1:]:
        body, *ended = segment.split(END)
        ids += [1, *reference(body, add_special_tokens=False, split_special_tokens=True).input_ids, *[2 for _ in ended]]
    return ids


@given(texts=st.integers(1, 6).flatmap(lambda turns: st.lists(TEXTS, min_size=2 * turns - 1, max_size=2 * turns - 1)))
@pytest.mark.parametrize("system", [None, "Answer in one sentence.", "", "  spaces around \n"])
def test_a_conversation_is_encoded_like_the_checkpoints_template(
    reference: LlamaTokenizer, ours: Tokenizer, texts: list[str], system: str | None
) -> None:
    """One to six turns of any text, with and without a system prompt, give the same tokens."""
    messages = conversation(texts, system=system)
    assert ours.encode_chat(messages) == reference_ids(reference, messages)


def test_plain_text_is_encoded_like_apply_chat_template(reference: LlamaTokenizer, ours: Tokenizer) -> None:
    """If no message contains the name of a special token, one call of transformers gives the same ids."""
    messages = conversation(["Hi there!", " I am\na llama. ", "今天 🦙?"], system="Be brief.")
    dialogue = [message._asdict() for message in messages]
    expected: Any = reference.apply_chat_template(dialogue, tokenize=True, return_dict=True)
    assert ours.encode_chat(messages) == expected["input_ids"]


def test_a_turn_has_the_published_shape(ours: Tokenizer) -> None:
    """The ids are <s>, the turn and </s>, then <s> and the open turn."""
    processor = ours._model
    first, last = processor.encode("[INST] a [/INST] b "), processor.encode("[INST] c [/INST]")
    assert ours.encode_chat(conversation(["a", "b", "c"], system=None)) == [1, *first, 2, 1, *last]


@pytest.mark.parametrize(
    "roles", ["", "system", "assistant", "user user", "user assistant", "user system user", "system assistant", "tool"]
)
def test_roles_out_of_order_are_rejected(ours: Tokenizer, roles: str) -> None:
    """A conversation that the template cannot express is rejected."""
    with pytest.raises(ValueError, match="roles must be"):
        ours.encode_chat([ChatMessage(role, "text") for role in roles.split()])


@given(text=st.text(st.characters(codec="utf-8")))
def test_raw_text_gets_only_a_bos(ours: Tokenizer, text: str) -> None:
    """A raw prompt is encoded unchanged; template tags and token names in it are text."""
    assert ours.encode_raw(text) == [1, *ours._model.encode(text)]


def test_a_literal_token_name_stays_text(ours: Tokenizer) -> None:
    """A client cannot end a turn with the text </s>."""
    ids = ours.encode_raw("<s></s><unk><0x0A>")[1:]
    assert not {0, 1, 2} & set(ids)
    assert ours.decode(ids) == "<s></s><unk><0x0A>"


def test_no_token_is_longer_than_max_piece_length(ours: Tokenizer) -> None:
    """Therefore a text of n characters has at least n / max_piece_length tokens."""
    decoded = [ours.decode([ours.encode_raw("a")[1], token_id])[1:] for token_id in range(ours.vocab_size)]
    assert ours.max_piece_length == max(map(len, decoded))


def test_the_template_contains_the_control_tags(reference: LlamaTokenizer) -> None:
    """The checkpoint's template contains each control tag."""
    assert all(tag in reference.chat_template for tag in CONTROL_TAGS)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 1000])
def test_an_invalid_tokenizer_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    """The error for an invalid tokenizer.model contains its path."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(
        WeightsError, match=f"{path}: not a SentencePiece model; copy it from the Llama-2 checkpoint again"
    ):
        Tokenizer(path)


def test_a_missing_tokenizer_is_rejected(tmp_path: Path) -> None:
    """The error for a missing tokenizer.model contains the expected path."""
    with pytest.raises(WeightsError, match=r"tokenizer\.model: no such file; copy it from the Llama-2 checkpoint"):
        Tokenizer(tmp_path / "tokenizer.model")


def train(prefix: Path, **special_ids: int) -> Path:
    """Train a small SentencePiece model with these ids of its special tokens."""
    lines = iter(["some text to train on"] * 10)
    settings: dict[str, Any] = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2, **special_ids}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(prefix), **settings)
    return prefix.with_suffix(".model")


@pytest.mark.parametrize("missing", ["bos_id", "eos_id"])
def test_a_tokenizer_without_start_or_end_token_is_rejected(tmp_path: Path, missing: str) -> None:
    """Llama-2's template needs <s> and </s>."""
    path = train(tmp_path / "tokenizer", **{missing: -1})
    with pytest.raises(WeightsError, match="has no <s> or no </s>"):
        Tokenizer(path)


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 0, 2)])
def test_special_tokens_may_have_any_ids(tmp_path: Path, ids: tuple[int, int, int]) -> None:
    """Also 0, which is <unk> in Llama-2."""
    tokenizer = Tokenizer(train(tmp_path / "tokenizer", **dict(zip(("bos_id", "eos_id", "unk_id"), ids, strict=True))))
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids[:2]
    assert tokenizer.encode_raw("text")[0] == ids[0]
