"""Prompts of exact lengths that share no beginning, so that nobody reuses anything."""

import random
from dataclasses import dataclass
from pathlib import Path

from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text, and its token ids when it is sent as it is, without a chat template."""

    text: str
    token_ids: list[int]


class Prompts:
    """Makes random prompts of digits, each of which is one token in Llama's vocabularies."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        self._tokenizer = Tokenizer(checkpoint / "tokenizer.model")
        self._chance = random.Random(seed)

    def of_length(self, tokens: int) -> Prompt:
        """A prompt of so many tokens, the one that begins a text included."""
        beside = len(self._tokenizer.encode_raw("0")) - 1
        text = self.digits(tokens - beside)
        token_ids = self._tokenizer.encode_raw(text)
        if len(token_ids) != tokens:
            raise ValueError(f"{len(token_ids)} tokens in a prompt of {tokens}: a digit is not a token here")
        return Prompt(text, token_ids)

    def digits(self, count: int) -> str:
        """So many random digits."""
        return "".join(self._chance.choices("0123456789", k=count))

    def continuation(self, token_ids: list[int]) -> str:
        """What the service says when it generates these tokens after a prompt that was sent as it is."""
        if self._tokenizer.eos_id in token_ids:
            token_ids = token_ids[: token_ids.index(self._tokenizer.eos_id)]
        detokenizer = Detokenizer(self._tokenizer, keep_leading_space=True)
        return "".join(map(detokenizer.decode, token_ids)) + detokenizer.flush()
