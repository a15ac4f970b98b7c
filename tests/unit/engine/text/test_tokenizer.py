"""The chat template against the checkpoint's own, as transformers renders and encodes it."""

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

BEGIN, END = "\ue000", "\ue001"  # private use: in no conversation, so a literal <s> cannot be mistaken for them

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
    """Transformers' tokenizer of a made checkpoint; its chat_template is Llama-2-7b-chat-hf's."""
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
    """The template's own text, encoded segment by segment, so that a literal <s> in a message is no token."""
    dialogue = [message._asdict() for message in messages]
    text: Any = reference.apply_chat_template(dialogue, tokenize=False, bos_token=BEGIN, eos_token=END)
    ids: list[int] = []
    for segment in text.split(BEGIN)[1:]:
        body, *ended = segment.split(END)
        ids += [1, *reference(body, add_special_tokens=False, split_special_tokens=True).input_ids, *[2 for _ in ended]]
    return ids


@given(texts=st.integers(1, 6).flatmap(lambda turns: st.lists(TEXTS, min_size=2 * turns - 1, max_size=2 * turns - 1)))
@pytest.mark.parametrize("system", [None, "Answer in one sentence.", "", "  spaces around \n"])
def test_a_conversation_is_encoded_as_by_the_checkpoints_template(
    reference: LlamaTokenizer, ours: Tokenizer, texts: list[str], system: str | None
) -> None:
    """One to six turns of any text, with and without a system prompt, token for token."""
    messages = conversation(texts, system=system)
    assert ours.encode_chat(messages) == reference_ids(reference, messages)


def test_plain_text_is_encoded_as_transformers_does_by_itself(reference: LlamaTokenizer, ours: Tokenizer) -> None:
    """Where no message holds a special token's name, transformers' own one-call path gives the same ids."""
    messages = conversation(["Hi there!", " I am\na llama. ", "今天 🦙?"], system="Be brief.")
    dialogue = [message._asdict() for message in messages]
    expected: Any = reference.apply_chat_template(dialogue, tokenize=True, return_dict=True)
    assert ours.encode_chat(messages) == expected["input_ids"]


def test_a_turn_has_the_published_shape(ours: Tokenizer) -> None:
    """<s>, the turn, </s>; then <s> and the open turn."""
    processor = ours._processor
    first, last = processor.encode("[INST] a [/INST] b "), processor.encode("[INST] c [/INST]")
    assert ours.encode_chat(conversation(["a", "b", "c"], system=None)) == [1, *first, 2, 1, *last]


@pytest.mark.parametrize(
    "roles", ["", "system", "assistant", "user user", "user assistant", "user system user", "system assistant", "tool"]
)
def test_roles_out_of_order_are_refused(ours: Tokenizer, roles: str) -> None:
    """A conversation that the template cannot express is no conversation."""
    with pytest.raises(ValueError, match="roles must be"):
        ours.encode_chat([ChatMessage(role, "text") for role in roles.split()])


@given(text=st.text(st.characters(codec="utf-8")))
def test_raw_text_gets_a_bos_and_nothing_else(ours: Tokenizer, text: str) -> None:
    """A raw prompt is encoded as it is: template tags and token names in it are text."""
    assert ours.encode_raw(text) == [1, *ours._processor.encode(text)]


def test_a_literal_token_name_stays_text(ours: Tokenizer) -> None:
    """Nobody can end a turn by writing </s>."""
    ids = ours.encode_raw("<s></s><unk><0x0A>")[1:]
    assert not {0, 1, 2} & set(ids)
    assert ours.decode(ids) == "<s></s><unk><0x0A>"


def test_no_token_is_longer_than_the_longest_piece(ours: Tokenizer) -> None:
    """So a text of n characters has at least n / max_piece_length tokens."""
    decoded = [ours.decode([ours.encode_raw("a")[1], token_id])[1:] for token_id in range(ours.vocab_size)]
    assert ours.max_piece_length == max(map(len, decoded))


def test_the_tags_are_the_templates(reference: LlamaTokenizer) -> None:
    """Each control tag is one that the checkpoint's template writes."""
    assert all(tag in reference.chat_template for tag in CONTROL_TAGS)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 1000])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path, content: bytes) -> None:
    """Rubbish in tokenizer.model is refused with its path."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{path}: not a SentencePiece model"):
        Tokenizer(path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """A directory without tokenizer.model is refused with the path that was looked for."""
    with pytest.raises(WeightsError, match=r"tokenizer\.model: no such file"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("missing", ["bos_id", "eos_id"])
def test_a_tokenizer_without_begin_or_end_is_refused(tmp_path: Path, missing: str) -> None:
    """Llama-2's template cannot be written without <s> and </s>."""
    prefix = tmp_path / "tokenizer"
    lines = iter(["some text to train on"] * 10)
    settings: dict[str, Any] = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2, missing: -1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(prefix), **settings)
    with pytest.raises(WeightsError, match="has no <s> or no </s>"):
        Tokenizer(prefix.with_suffix(".model"))
