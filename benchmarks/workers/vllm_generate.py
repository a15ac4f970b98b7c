"""vLLM for CPUs, called with token ids in its own process; bfloat16, its type for CPUs.

The weights of the benchmark are rounded to bfloat16, so they are the same numbers.
"""

import os
import time
from typing import Any

from benchmarks.workers.protocol import TEMPERATURE, TOP_P, Generated, Setup, serve

# vLLM reads these at its import. A second process for the engine would cost each token a message.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}


class Vllm:
    """A checkpoint in vLLM; several prompts are concurrent requests."""

    packages = ("vllm-cpu", "torch")
    arithmetic = "bfloat16 weights, bfloat16 products"

    def __init__(self, setup: Setup) -> None:
        from vllm import LLM

        os.environ["OMP_NUM_THREADS"] = str(setup.threads)
        self._engine: Any = LLM(
            model=setup.checkpoint,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=setup.context_length,
            max_num_seqs=setup.slots,
            enable_prefix_caching=False,
        ).llm_engine
        self._requests = 0

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Add all requests, then run the engine's steps until all have ended."""
        from vllm import SamplingParams

        replies: dict[str, list[int]] = {}
        started_at = time.perf_counter()
        for index, prompt in enumerate(prompts):
            sampling = {"temperature": 0.0} if seed is None else {"temperature": TEMPERATURE, "top_p": TOP_P}
            parameters = SamplingParams(
                **sampling,
                seed=None if seed is None else seed + index,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
            )
            self._requests += 1
            replies[str(self._requests)] = []
            self._engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, parameters)
        first_token_at = 0.0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                replies[output.request_id] = list(output.outputs[0].token_ids)
            if not first_token_at and all(replies.values()):
                first_token_at = time.perf_counter()
        return Generated(list(replies.values()), first_token_at - started_at, time.perf_counter() - started_at)


if __name__ == "__main__":
    serve(Vllm)
