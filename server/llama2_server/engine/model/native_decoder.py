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
from llama2_server.engine.model.weight_layout import AMX, ROWS
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import (
    LayerPointers,
    MatrixPointers,
    ModelPointers,
    NativeUnavailable,
    find_instructions,
    load_library,
    prefill_rows,
)


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
            instructions: name of an instruction set; "" selects the best available for the layout of the weights.

        Raises:
            NativeUnavailable: the library is missing, the processor does not support the instructions, or they cannot
                read the layout of the weights.
        """
        library = load_library()
        layout = weights.head.layout if isinstance(weights.head, PackedMatrix) else ROWS
        self.instructions = find_instructions(instructions or layout.instructions)
        if (self.instructions == AMX) != (layout.instructions == AMX):
            raise NativeUnavailable(f"{self.instructions} cannot read weights that are stored for {layout.kernels}")
        self.kernels = layout.kernels
        self.prefill_rows = prefill_rows(self.instructions)
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
        self._buffers = _Buffers(self.max_rows)
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
        buffers, row, sampled_rows = self._buffers, 0, 0
        for slot, token_ids, position, sampler in parts:
            for index, token_id in enumerate(token_ids):
                buffers.set_row(row, slot, token_id, position + index)
                row += 1
            if sampler is not None:
                for uniform in sampler.uniforms(len(token_ids)):
                    buffers.set_sampled_row(sampled_rows, sampler.handle, uniform)
                    sampled_rows += 1
        self._run(row, sampled_rows, None, *buffers.sampling)
        return self._sampled(parts)

    def _sampled(self, parts: Sequence[SlotTokens]) -> list[list[int]]:
        """Return the tokens of the parts with a sampler, from the buffer of the last step."""
        token_ids = iter(self._buffers.sampled)
        found_ids = []
        for part in parts:
            if part.sampler is not None:
                found = [token_id for token_id in islice(token_ids, len(part.token_ids)) if token_id != NOT_SAMPLED]
                part.sampler.use_uniforms(len(found))
                found_ids.append(found)
        return found_ids

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

    def _step(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        logit_rows: int = 0,
        logits: int | None = None,
    ) -> None:
        """Run one step; `logits` is the address of the logits, null if left out."""
        for row, values in enumerate(zip(slots, token_ids, positions, strict=True)):
            self._buffers.set_row(row, *values)
        self._run(len(slots), logit_rows, logits, None, None, None)

    def _run(self, rows: int, logit_rows: int, *outputs: Any) -> None:
        """Run one step with the rows of the buffers; `outputs` are the last arguments of `llama2_decoder_step`."""
        if not self._step_function(self._decoder, rows, *self._buffers.rows, logit_rows, *outputs):
            slots, token_ids, positions = (list(numbers[:rows]) for numbers in self._buffers.rows)
            raise EngineError(
                f"out of range, or a sampler of another vocabulary: tokens {token_ids} at {positions} of slots {slots}"
            )


class _Buffers:
    """The arguments of a step; every step uses the same memory, because creating it costs time per token."""

    def __init__(self, max_rows: int) -> None:
        numbers = ctypes.c_int32 * max_rows
        self.rows = (numbers(), numbers(), numbers())
        """Slots, token ids and positions."""
        self.sampled = numbers()
        self.sampling = ((ctypes.c_void_p * max_rows)(), (ctypes.c_double * max_rows)(), self.sampled)
        """Samplers, their numbers and the sampled tokens."""

    def set_row(self, row: int, slot: int, token_id: int, position: int) -> None:
        """Set the token of a row; raise EngineError for more rows than a step can have."""
        slots, token_ids, positions = self.rows
        try:
            slots[row], token_ids[row], positions[row] = slot, token_id, position
        except IndexError as error:
            raise EngineError(f"a step has at most {len(slots)} rows") from error

    def set_sampled_row(self, row: int, sampler: int, uniform: float) -> None:
        """Set the sampler of a sampled row, and the number that selects its token."""
        samplers, uniforms, _ = self.sampling
        samplers[row], uniforms[row] = sampler, uniform


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
