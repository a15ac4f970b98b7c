"""`LlamaForCausalLM.generate` as its documentation shows it."""

import time
from typing import Any

import torch
import transformers

from benchmarks.workers.protocol import Generated, Setup, serve


class _Clock(transformers.StoppingCriteria):
    """Notes when tokens come, and never stops: generate asks it after every one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class TransformersGenerate:
    """Several prompts are one static batch."""

    packages = ("transformers", "torch")
    arithmetic = "float16"

    def __init__(self, setup: Setup) -> None:
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        torch.set_num_threads(setup.threads)
        self._model: Any = transformers.LlamaForCausalLM.from_pretrained(setup.checkpoint, dtype=torch.float16)
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        """One call of generate."""
        inputs = torch.tensor(prompts)
        clock, begun = _Clock(), time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=[clock],
            )
        ended = time.perf_counter()
        return Generated(output[:, inputs.shape[1] :].tolist(), clock.times[0] - begun, ended - begun)


if __name__ == "__main__":
    serve(TransformersGenerate)
