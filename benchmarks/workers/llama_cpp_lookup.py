"""llama-cpp-python with its own prompt lookup, which greedy replies use."""

import time
from typing import Any

import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from numpy.typing import NDArray

from benchmarks.workers.gguf_file import gguf_of
from benchmarks.workers.protocol import Generated, Setup, serve

GUESSES = 15  # as many as our engine checks


class _CountingLookup(LlamaPromptLookupDecoding):  # type: ignore[misc] # the library has no types
    """The library's prompt lookup; it is called once per step."""

    calls = 0

    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: Any) -> Any:
        """Return the guesses."""
        self.calls += 1
        return super().__call__(input_ids, **kwargs)


class LlamaCppLookup:
    """A checkpoint in llama-cpp-python, for one greedy reply at a time."""

    packages = ("llama-cpp-python",)

    def __init__(self, setup: Setup) -> None:
        self.arithmetic = f"{setup.arithmetic} weights"
        self._lookup = _CountingLookup(num_pred_tokens=GUESSES) if setup.prompt_lookup else None
        self._model = Llama(
            str(gguf_of(setup)),
            n_ctx=setup.context_length,
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            draft_model=self._lookup,
            verbose=False,
        )

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Continue one prompt greedily."""
        if len(prompts) != 1 or seed is not None:
            raise SystemExit("only one greedy reply at a time")
        self._model.reset()
        if self._lookup is not None:
            self._lookup.calls = 0
        started_at = time.perf_counter()
        reply, first_token_at = [], 0.0
        for token in self._model.generate(prompts[0], temp=0.0, repeat_penalty=1.0):
            first_token_at = first_token_at or time.perf_counter()
            reply.append(token)
            if len(reply) == tokens:
                break
        finished_at = time.perf_counter()
        steps = None if self._lookup is None else self._lookup.calls
        return Generated([reply], first_token_at - started_at, finished_at - started_at, steps)


if __name__ == "__main__":
    serve(LlamaCppLookup)
