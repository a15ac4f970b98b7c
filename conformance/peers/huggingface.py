"""The checkpoint under transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conformance.peers.adapter import TEMPERATURE, TOP_P, PeerReply


class TransformersPeer:
    """A model and a tokenizer of transformers, with its own chat template and decoding."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._model.generation_config.max_length = None  # each call has `max_new_tokens`

    def complete(self, prompt: str, max_tokens: int) -> PeerReply:
        """Continue a raw prompt."""
        return self._generate(self._tokenizer(prompt, return_tensors="pt"), max_tokens)

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> PeerReply:
        """Reply to a conversation."""
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return self._generate(self._tokenizer(text, return_tensors="pt", add_special_tokens=False), max_tokens)

    def _generate(self, inputs: Any, max_tokens: int) -> PeerReply:
        options = {"max_new_tokens": max_tokens, "do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}
        count = inputs["input_ids"].shape[1]
        generated = self._model.generate(**inputs, **options)[0, count:].tolist()
        ended = generated[-1] == self._tokenizer.eos_token_id
        text = self._tokenizer.decode(generated, skip_special_tokens=True)
        return PeerReply(text, "END_OF_SEQUENCE" if ended else "MAX_TOKENS", count, len(generated))
