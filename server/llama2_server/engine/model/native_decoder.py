"""The native forward pass on a CPU (decode.cpp)."""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.kv_cache import KVCache
from llama2_server.engine.model.native_sampler import NOT_SAMPLED, NativeSampler
from llama2_server.engine.model.packed_weights import PackedMatrix
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import (
    LayerPointers,
    MatrixPointers,
    ModelPointers,
    NativeUnavailable,
    find_instructions,
    load_library,
)

OUTPUTS = 4  # of a step: logits, samplers, their numbers, sampled tokens


class SlotTokens(NamedTuple):
    """Tokens that a step appends to a slot, which holds `position` tokens."""

    slot: int
    token_ids: Sequence[int]
    position: int
    sampler: NativeSampler | None = None
    """Samples a token after each of the tokens; None if no token is sampled."""


class NativeDecoder:
    """The native forward pass of one float16 model; it works on the model's weights and KV cache in place."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights[Any],
        kv_cache: KVCache,
        rotary: tuple[Tensor, Tensor],
        *,
        threads: int,
        instructions: str = "",
    ) -> None:
        """Create the C++ decoder.

        Args:
            config: shapes of the model.
            weights: float16 or packed weights, shared with the decoder.
            kv_cache: float16 keys and values, shared with the decoder.
            rotary: cosines and signed sines, each (context_length, head_dim).
            threads: number of threads, the calling one included.
            instructions: name of an instruction set; "" selects the best available.

        Raises:
            NativeUnavailable: the library is missing, or the processor does not support the instructions.
        """
        library = load_library()
        self.instructions = find_instructions(instructions)
        cosines, sines = (table.float().contiguous() for table in rotary)
        # Keep the tensors alive: the C++ decoder holds only pointers to them.
        self._memory = (weights, kv_cache, cosines, sines)
        self._vocab_size = config.vocab_size
        model = _model_pointers(config, weights, kv_cache, (cosines, sines))
        layers = (LayerPointers * config.layers)(
            *(
                _layer_pointers(layer, keys, values)
                for layer, keys, values in zip(weights.layers, kv_cache.keys, kv_cache.values, strict=True)
            )
        )
        self._decoder = library.llama2_decoder_new(model, layers, self.instructions.encode(), threads)
        if not self._decoder:
            raise NativeUnavailable("out of memory")
        self.max_rows: int = library.llama2_decoder_max_rows(self._decoder)
        self._step_function = library.llama2_decoder_step
        weakref.finalize(self, library.llama2_decoder_free, self._decoder)

    @property
    def vocab_size(self) -> int:
        """Number of logits per row."""
        return self._vocab_size

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Tensor:  # (vocab_size,)
        """Append tokens to a slot and return the logits after the last one, as in `LlamaModel.prefill`.

        The result has the same bits for any chunk sizes, single tokens included.
        """
        *first, last = self._chunks(slot, token_ids, position)
        for chunk in first:
            self._step(*chunk)
        return self._logits(*last, logit_rows=1)[0]

    def decode(self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append one token to each slot and return the logits after each, as in `LlamaModel.decode`.

        Each row has the same bits for any number and content of the other rows.
        """
        return self._logits(slots, token_ids, positions, logit_rows=len(slots))  # (rows, vocab_size)

    def sample(self, parts: Sequence[SlotTokens]) -> list[list[int]]:
        """Append tokens to slots in one step, and sample a token after each token of the parts with a sampler.

        In a part with several tokens, the later ones are guesses: one is sampled only if the token sampled before it
        is equal to it. Return the sampled tokens of these parts, at least one each; NO_TOKEN if a logit is not finite.
        Each row has the same bits as in a step without others.

        Args:
            parts: tokens of slots, at most `max_rows` in total, the parts without a sampler first. A sampler occurs in
                one part.
        """
        rows = [(part, index) for part in parts for index in range(len(part.token_ids))]
        samplers = [(part.sampler, len(part.token_ids)) for part in parts if part.sampler is not None]
        token_ids = self._sample(
            [part.slot for part, _ in rows],
            [part.token_ids[index] for part, index in rows],
            [part.position + index for part, index in rows],
            samplers,
        )
        sampled = []
        for sampler, count in samplers:
            found = [token_id for token_id in islice(token_ids, count) if token_id != NOT_SAMPLED]
            sampler.use_uniforms(len(found))
            sampled.append(found)
        return sampled

    def _chunks(
        self, slot: int, token_ids: Sequence[int], position: int
    ) -> Iterator[tuple[list[int], Sequence[int], range]]:
        for start in range(0, len(token_ids), self.max_rows):
            chunk = token_ids[start : start + self.max_rows]
            first = position + start
            yield [slot] * len(chunk), chunk, range(first, first + len(chunk))

    def _logits(
        self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int], logit_rows: int
    ) -> Tensor:  # (logit_rows, vocab_size)
        logits = torch.empty(logit_rows, self._vocab_size)
        self._step(slots, token_ids, positions, logit_rows, logits.data_ptr())
        return logits

    def _sample(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        samplers: Sequence[tuple[NativeSampler, int]],
    ) -> Iterator[int]:  # (rows with a sampler,)
        """Run one step; each sampler belongs to a number of rows, and all these rows are the last ones."""
        rows = sum(count for _, count in samplers)
        handles = (ctypes.c_void_p * rows)(*(sampler.handle for sampler, count in samplers for _ in range(count)))
        numbers = (number for sampler, count in samplers for number in sampler.uniforms(count))
        uniforms = (ctypes.c_double * rows)(*numbers)
        sampled = (ctypes.c_int32 * rows)()
        self._step(slots, token_ids, positions, rows, None, handles, uniforms, sampled)
        return iter(sampled)

    def _step(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        logit_rows: int = 0,
        *outputs: Any,
    ) -> None:
        """Run one step; `outputs` are the last arguments of `llama2_decoder_step`, null if left out."""
        rows = len(slots)
        numbers = ctypes.c_int32 * rows
        arguments = (rows, numbers(*slots), numbers(*token_ids), numbers(*positions), logit_rows)
        pointers = (*outputs, *[None] * (OUTPUTS - len(outputs)))
        if not self._step_function(self._decoder, *arguments, *pointers):
            raise EngineError(
                "out of range, or a sampler of another vocabulary: "
                f"tokens {list(token_ids)} at {list(positions)} of slots {list(slots)}"
            )


def _model_pointers(
    config: LlamaConfig, weights: LlamaWeights[Any], kv_cache: KVCache, rotary: tuple[Tensor, Tensor]
) -> ModelPointers:
    slots, _, context, _ = kv_cache.keys[0].shape
    return ModelPointers(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.layers,
        config.heads,
        config.kv_heads,
        config.head_dim,
        context,
        slots,
        config.rms_norm_eps,
        *map(_matrix_pointers, (weights.embedding, weights.head)),
        *(tensor.data_ptr() for tensor in (weights.norm, *rotary)),
    )


def _layer_pointers(layer: LayerWeights[Any], keys: Tensor, values: Tensor) -> LayerPointers:
    return LayerPointers(
        *(tensor.data_ptr() for tensor in (layer.attention_norm, layer.mlp_norm)),
        *map(_matrix_pointers, (layer.qkv, layer.output, layer.gate_up, layer.down)),
        *(tensor.data_ptr() for tensor in (keys, values)),
    )


def _matrix_pointers(matrix: Tensor | PackedMatrix) -> MatrixPointers:
    return MatrixPointers(matrix.data_ptr(), None) if isinstance(matrix, Tensor) else matrix.pointers()
