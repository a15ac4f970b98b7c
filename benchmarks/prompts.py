"""Prompts of exact lengths that share no prefix, so that no engine can reuse a KV cache."""

import random
from dataclasses import dataclass
from pathlib import Path

from llama2_server.engine.checkpoint.tokenizer_files import open_tokenizer
from llama2_server.engine.text.detokenizer import Detokenizer


@dataclass(frozen=True)
class Prompt:
    """A text and its token ids without the chat template."""

    text: str
    token_ids: list[int]


class Prompts:
    """A source of random prompts of digits; each digit is one token in Llama's vocabularies."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        self._tokenizer = open_tokenizer(checkpoint)
        self._random = random.Random(seed)

    def of_length(self, tokens: int) -> Prompt:
        """Return a prompt of exactly `tokens` tokens, the start token included."""
        extra = len(self._tokenizer.encode_raw("0")) - 1
        text = self.digits(tokens - extra)
        token_ids = self._tokenizer.encode_raw(text)
        if len(token_ids) != tokens:
            raise ValueError(
                f"tokenizer: a prompt of {tokens} digits has {len(token_ids)} tokens; one per digit expected"
            )
        return Prompt(text, token_ids)

    def digits(self, count: int) -> str:
        """Return a text of `count` random digits."""
        return "".join(self._random.choices("0123456789", k=count))

    def continuation(self, token_ids: list[int]) -> str:
        """Return the text that the service sends if it generates these tokens after a raw prompt."""
        if self._tokenizer.eos_id in token_ids:
            token_ids = token_ids[: token_ids.index(self._tokenizer.eos_id)]
        detokenizer = Detokenizer(self._tokenizer, keep_leading_space=True)
        return "".join(map(detokenizer.decode, token_ids)) + detokenizer.flush()
