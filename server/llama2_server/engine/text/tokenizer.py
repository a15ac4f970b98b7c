"""Text to token ids: SentencePiece and Llama-2's chat template."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

from llama2_server.engine.errors import WeightsError

# A caller's text that holds one of these could pose as another turn of the conversation.
CONTROL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
SPACE_SYMBOL = "\u2581"  # how SentencePiece spells a space inside a piece


class ChatMessage(NamedTuple):
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Tokenizer:
    """A checkpoint's own SentencePiece model."""

    def __init__(self, path: Path | str) -> None:
        """Raises WeightsError if `path` is no SentencePiece model with tokens for begin and end of a text."""
        self._processor = _open(Path(path))
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise WeightsError(f"{path}: has no <s> or no </s> token; Llama-2's chat template needs both")

    @cached_property
    def piece_texts(self) -> tuple[str | int, ...]:
        """What each token id stands for: text, with its leading space, or one byte's value."""
        return tuple(self._surface(token_id) for token_id in range(self.vocab_size))

    @cached_property
    def max_piece_length(self) -> int:
        """The most characters that a single token can stand for."""
        return max(len(surface) if isinstance(surface, str) else 1 for surface in self.piece_texts)

    def encode_raw(self, text: str) -> list[int]:
        """`<s>` and the ids of the text as it is."""
        return [self.bos_id, *self._processor.encode(text)]

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The ids of a conversation that ends with a user's message, in Llama-2's chat template.

        Each turn is encoded by itself between `<s>` and `</s>`, as in Meta's `Llama.chat_completion`
        (github.com/meta-llama/llama, llama/generation.py): a literal `<s>` in a message stays text. Raises ValueError
        unless the roles are: an optional system, then user and assistant in turn, a user's message at the end.
        """
        ids: list[int] = []
        for question, answer in _turns(messages):
            text = f"[INST] {question} [/INST]"
            ids += self.encode_raw(text) if answer is None else [*self.encode_raw(f"{text} {answer} "), self.eos_id]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all these tokens at once; bytes that are no UTF-8 become U+FFFD."""
        return str(self._processor.decode(list(token_ids)))

    def _surface(self, token_id: int) -> str | int:
        if self._processor.is_control(token_id):
            return ""
        if self._processor.is_unknown(token_id):
            return self.decode([token_id])
        piece: str = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return int(piece[1:-1], base=16)  # <0x0A>
        return piece.replace(SPACE_SYMBOL, " ")


def _open(path: Path) -> SentencePieceProcessor:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; a Llama-2 checkpoint comes with its SentencePiece model")
    processor = SentencePieceProcessor()
    try:
        processor.Load(str(path))  # unlike the constructor, it does not take an empty file for none at all
    except (RuntimeError, OSError) as error:
        raise WeightsError(f"{path}: not a SentencePiece model") from error
    return processor


def _turns(messages: Sequence[ChatMessage]) -> Iterator[tuple[str, str | None]]:
    """Pairs of question and answer, stripped as the checkpoint's template strips; the last one has no answer."""
    preamble, dialogue = _split_system(messages)
    _check_roles(dialogue)
    for index in range(0, len(dialogue), 2):
        # The template strips a turn with its system prompt in front as one text: spaces between the two stay.
        question = (preamble + dialogue[index].content).strip()
        yield question, dialogue[index + 1].content.strip() if index + 1 < len(dialogue) else None
        preamble = ""


def _split_system(messages: Sequence[ChatMessage]) -> tuple[str, Sequence[ChatMessage]]:
    if not messages or messages[0].role != "system":
        return "", messages
    return f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n", messages[1:]


def _check_roles(dialogue: Sequence[ChatMessage]) -> None:
    expected = ["user", "assistant"] * (len(dialogue) // 2) + ["user"]
    if [message.role for message in dialogue] != expected:
        raise ValueError("roles must be user, assistant, user, ... and end with user, after at most one system message")
