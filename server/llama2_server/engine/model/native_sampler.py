"""Native sampling of the next token (sampling.hpp), by the rules of the reference sampler in `engine/sampling.py`."""

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import islice

from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.native.library import SamplingParams, load_library
from llama2_server.engine.sampling import GenerationParams

NO_TOKEN = -1
"""The token id of a row whose logits are not finite."""
NOT_SAMPLED = -2
"""The token id of a row that follows a wrong guess."""


class NativeSampler:
    """The sampling state of one sequence: its random stream and, for penalties, the tokens seen so far."""

    def __init__(self, params: GenerationParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        """Create the C++ state.

        Raises:
            EngineError: a prompt token does not exist, or there is not enough memory.
            NativeUnavailable: the library is missing.
        """
        library = load_library()
        native = SamplingParams(
            *(params.temperature, params.top_p, params.frequency_penalty, params.presence_penalty),
            *(params.repetition_penalty, min(params.top_k, vocab_size)),
        )
        prompt = (ctypes.c_int32 * len(prompt_ids))(*prompt_ids)
        self.handle: int = library.llama2_sampler_new(vocab_size, native, prompt, len(prompt_ids))
        if not self.handle:
            raise EngineError(f"cannot sample: a prompt token is not below {vocab_size}, or out of memory")
        weakref.finalize(self, library.llama2_sampler_free, self.handle)
        self._sample = library.llama2_sampler_sample
        self._greedy = params.temperature == 0
        self._uniform = random.Random(params.seed).random  # noqa: S311 - no secret depends on it
        self._drawn: deque[float] = deque()  # and not used yet, because guesses were wrong

    def uniforms(self, count: int) -> list[float]:
        """Return the numbers in [0, 1) that select the next `count` tokens; a greedy sequence uses none."""
        if self._greedy:
            return [0.0] * count
        while len(self._drawn) < count:
            self._drawn.append(self._uniform())
        return list(islice(self._drawn, count))

    def use_uniforms(self, count: int) -> None:
        """Continue after the first `count` numbers of `uniforms`, which have selected a token each."""
        for _ in range(0 if self._greedy else count):
            self._drawn.popleft()

    def sample(self, logits: Tensor, instructions: str = "") -> list[int]:  # (tokens, vocab_size), float32
        """Return one token per row, as if the rows were the logits of successive steps; NO_TOKEN if not finite.

        A decode step samples without this function.

        Raises:
            EngineError: the processor does not support the instructions, or there is not enough memory.
        """
        rows, logits = logits.shape[0], logits.contiguous()
        token_ids = (ctypes.c_int32 * rows)()
        uniforms = (ctypes.c_double * rows)(*self.uniforms(rows))
        if not self._sample(self.handle, instructions.encode(), rows, logits.data_ptr(), uniforms, token_ids):
            raise EngineError(f"cannot sample with {instructions or 'the native library'}")
        self.use_uniforms(rows)
        return list(token_ids)
