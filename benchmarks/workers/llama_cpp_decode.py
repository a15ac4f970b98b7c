"""llama.cpp through its C interface, with llama.cpp's own samplers.

Several prompts are sequences of one context and share each decode step. The KV cache is float16, as in our engine.
"""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp

from benchmarks.workers.gguf_file import gguf_of
from benchmarks.workers.protocol import TEMPERATURE, TOP_P, Generated, Setup, serve

BATCH_TOKENS = 512  # llama.cpp's own default


class LlamaCpp:
    """A checkpoint in llama.cpp."""

    packages = ("llama-cpp-python",)

    def __init__(self, setup: Setup) -> None:
        self.arithmetic = {
            "F16": "float16 weights, float16 products in float32 sums",
            "BF16": "bfloat16 weights, bfloat16 products in float32 sums",
        }[setup.arithmetic]
        self._model, self._context = _load(gguf_of(setup), setup)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._samplers: list[Any] = []
        self._batch: Any = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Prefill one prompt after another, then decode all together."""
        llama_cpp.llama_memory_clear(self._memory, False)
        with ExitStack() as samplers:
            self._samplers = [_sampler(samplers, seed, index) for index in range(len(prompts))]
            return self._generate(prompts, tokens)

    def _generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        started_at = time.perf_counter()
        latest = [self._prefill(sequence, prompt) for sequence, prompt in enumerate(prompts)]
        first_token_at = time.perf_counter()
        replies = [[token] for token in latest]
        for position in range(len(prompts[0]), len(prompts[0]) + tokens - 1):
            latest = self._step([(sequence, token, position, True) for sequence, token in enumerate(latest)])
            for reply, token in zip(replies, latest, strict=True):
                reply.append(token)
        return Generated(replies, first_token_at - started_at, time.perf_counter() - started_at)

    def _prefill(self, sequence: int, prompt: list[int]) -> int:
        for start in range(0, len(prompt), BATCH_TOKENS):
            piece = list(enumerate(prompt))[start : start + BATCH_TOKENS]
            next_tokens = self._step([(sequence, token, at, at == len(prompt) - 1) for at, token in piece])
        return next_tokens[0]

    def _step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode rows of (sequence, token, position, needs logits); return the next tokens of rows that need logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (sequence, token, position, needs_logits) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = needs_logits
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama_decode failed")
        return [
            int(llama_cpp.llama_sampler_sample(self._samplers[sequence], self._context, index))
            for index, (sequence, _, _, needs_logits) in enumerate(rows)
            if needs_logits
        ]


def _sampler(stack: ExitStack, seed: int | None, index: int) -> Any:
    """Return the sampler of one sequence, which `stack` frees."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    stack.callback(llama_cpp.llama_sampler_free, chain)
    if seed is None:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    # In the order of the card: the nucleus is that of the probabilities at the temperature.
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(TEMPERATURE))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(TOP_P, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist((seed + index) % 2**32))
    return chain


def _load(path: Path, setup: Setup) -> tuple[Any, Any]:
    model_params = llama_cpp.llama_model_default_params()
    model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # memory-mapped weights would have no huge pages
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
    params = llama_cpp.llama_context_default_params()
    # Like llama.cpp's own server: one pool of KV cells for all sequences.
    params.kv_unified = True
    params.n_ctx = setup.context_length * setup.slots
    params.n_batch = BATCH_TOKENS
    params.n_seq_max = setup.slots
    params.n_threads = params.n_threads_batch = setup.threads
    context = llama_cpp.llama_init_from_model(model, params) if model else None
    if not context:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return model, context


if __name__ == "__main__":
    serve(LlamaCpp)
