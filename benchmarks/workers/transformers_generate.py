"""`LlamaForCausalLM.generate`, called as in its documentation."""

import time
from typing import Any

import torch
import transformers

from benchmarks.workers.protocol import TEMPERATURE, TOP_P, Generated, Setup, serve


class _TokenTimes(transformers.StoppingCriteria):
    """A stopping criterion that records the time of each token and never stops the generation."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class TransformersGenerate:
    """A checkpoint in transformers ; several prompts form one static batch."""

    packages = ("transformers", "torch")
    arithmetic = "float16"

    def __init__(self, setup: Setup) -> None:
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        torch.set_num_threads(setup.threads)
        self._model: Any = transformers.LlamaForCausalLM.from_pretrained(setup.checkpoint, dtype=torch.float16)
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Continue all prompts with one call of generate."""
        inputs = torch.tensor(prompts)
        sampling: dict[str, Any] = {"do_sample": False}
        if seed is not None:
            torch.manual_seed(seed)
            sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        token_times, started_at = _TokenTimes(), time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                **sampling,
                stopping_criteria=[token_times],
            )
        finished_at = time.perf_counter()
        token_ids = output[:, inputs.shape[1] :].tolist()
        return Generated(token_ids, token_times.times[0] - started_at, finished_at - started_at)


if __name__ == "__main__":
    serve(TransformersGenerate)
