"""Convert text to token ids with the checkpoint's tokenizer and Llama-2's chat template."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from llama2_server.engine.errors import WeightsError
from llama2_server.engine.text.sentencepiece_model import SentencePieceModel
from llama2_server.engine.text.tokenizer_json import TokenizerJson

# Tags of the chat template. In a client's text they could imitate another turn of the conversation.
CONTROL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class ChatMessage(NamedTuple):
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Tokenizer:
    """The tokenizer of a checkpoint, a SentencePiece model or a `tokenizer.json`."""

    def __init__(self, path: Path | str) -> None:
        """Raise WeightsError if `path` is not a tokenizer with tokens for the start and end of a text."""
        path = Path(path)
        self._model = TokenizerJson(path) if path.suffix == ".json" else SentencePieceModel(path)
        self.vocab_size = self._model.vocab_size
        self.bos_id = self._model.bos_id
        self.eos_id = self._model.eos_id
        self.strips_space_byte = self._model.strips_space_byte
        self.skips_silent_tokens = self._model.skips_silent_tokens
        self.file_name = path.name
        if self.bos_id < 0 or self.eos_id < 0:
            raise WeightsError(f"{path}: has no <s> or no </s> token; use the tokenizer of a Llama-2 checkpoint")

    @cached_property
    def piece_texts(self) -> tuple[str | int, ...]:
        """Text of each token id, with its leading space, or the value of a byte token."""
        return tuple(self._model.piece_text(token_id) for token_id in range(self.vocab_size))

    @cached_property
    def max_piece_length(self) -> int:
        """Maximum number of characters per token."""
        return max(len(text) if isinstance(text, str) else 1 for text in self.piece_texts)

    def encode_raw(self, text: str) -> list[int]:
        """Return `<s>` and the ids of the unchanged text."""
        return [self.bos_id, *self._model.encode(text)]

    def encode_chat(self, messages: Sequence[ChatMessage], *, max_tokens: int | None = None) -> list[int]:
        """Return the ids of a conversation that ends with a user's message, in Llama-2's chat template.

        Each turn is encoded separately between `<s>` and `</s>`, as in Meta's `Llama.chat_completion`
        (github.com/meta-llama/llama, llama/generation.py). A literal `<s>` in a message stays text. Encoding stops
        after the turn with which the conversation has more than `max_tokens`.

        Raises:
            ValueError: the roles are not an optional system message, then user and assistant in alternation, with a
                user's message at the end.
        """
        ids: list[int] = []
        for text, ended in self.chat_turns(messages):
            ids += [*self.encode_raw(text), *([self.eos_id] if ended else [])]
            if max_tokens is not None and len(ids) > max_tokens:
                break
        return ids

    def chat_turns(self, messages: Sequence[ChatMessage]) -> Iterator[tuple[str, bool]]:
        """Yield the text of each turn of a conversation, and whether `</s>` ends it.

        Raises:
            ValueError: as in `encode_chat`.
        """
        for question, answer in _turns(messages):
            text = f"[INST] {question} [/INST]"
            yield (text, False) if answer is None else (f"{text} {answer} ", True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of all tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return self._model.decode(token_ids)

    def token(self, token_id: int) -> str:
        """Return the name of a token, or an empty string for an id without a token."""
        return self._model.token(token_id) if token_id < self.vocab_size else ""


def _turns(messages: Sequence[ChatMessage]) -> Iterator[tuple[str, str | None]]:
    """Yield pairs of question and answer, stripped as in the chat template; the last question has no answer."""
    preamble, dialogue = _split_system(messages)
    _check_roles(dialogue)
    for index in range(0, len(dialogue), 2):
        # The template strips the system prompt and the first turn as one text, so spaces between the two stay.
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
        raise ValueError(
            "messages: roles must be user, assistant, user, ... and end with user, after at most one system message"
        )
