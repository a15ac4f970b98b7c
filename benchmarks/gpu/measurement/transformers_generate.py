"""`transformers.generate` with the same tensors, on the same device, in the same run."""

import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.gpu.measurement.ceilings import synchronize
from benchmarks.gpu.measurement.engine_only import ROUNDS
from llama2_server.engine.checkpoint.loader import tensor_destinations
from llama2_server.engine.model.llama import LlamaModel


class TransformersGenerate:
    """LlamaForCausalLM that shares the memory of a LlamaModel."""

    def __init__(self, model: LlamaModel) -> None:
        config = model.config
        with torch.device("meta"):
            self._model: Any = LlamaForCausalLM(
                HFConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.layers,
                    num_attention_heads=config.heads,
                    num_key_value_heads=config.kv_heads,
                    max_position_embeddings=config.max_positions,
                    rms_norm_eps=config.rms_norm_eps,
                    tie_word_embeddings=config.tied_embeddings,
                    dtype=model.dtype,
                )
            )
        self._model.load_state_dict(tensor_destinations(config, model.weights), assign=True, strict=True)
        # The only buffer that is not part of a checkpoint.
        with model.device:
            self._model.model.rotary_emb = type(self._model.model.rotary_emb)(self._model.config)
        self._model.train(False)
        self._device = str(model.device)
        self._vocab_size = config.vocab_size

    @torch.inference_mode()
    def tokens_per_second(self, prompt_tokens: int, new_tokens: int, **options: object) -> float:
        """Measure greedy decoding after the first token."""
        prompt = torch.randint(3, self._vocab_size, (1, prompt_tokens), device=self._device)
        rates = []
        for _ in range(ROUNDS + 2):
            token_times = _TokenTimes()
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=token_times,
                **options,
            )
            synchronize(self._device)
            rates.append((new_tokens - 1) / (time.perf_counter() - token_times.times[1]))
        return statistics.median(rates[2:])


class _TokenTimes(BaseStreamer):
    """A streamer that records the time of each token; `generate` passes the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
