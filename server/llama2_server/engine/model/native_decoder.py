"""The native forward pass on a CPU (decode.cpp)."""

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.kv_cache import KVCache
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import LayerPointers, ModelPointers, NativeUnavailable, load_library


class NativeDecoder:
    """The native forward pass of one float16 model; it works on the model's weights and KV cache in place."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights,
        kv_cache: KVCache,
        rotary: tuple[Tensor, Tensor],
        *,
        threads: int,
        instructions: str = "",
    ) -> None:
        """Create the C++ decoder.

        Args:
            config: shapes of the model.
            weights: float16 weights, shared with the decoder.
            kv_cache: float16 keys and values, shared with the decoder.
            rotary: cosines and signed sines, each (context_length, head_dim).
            threads: number of threads, the calling one included.
            instructions: name of an instruction set; "" selects the best available.

        Raises:
            NativeUnavailable: the library is missing, or the processor does not support the instructions.
        """
        library = load_library()
        found = library.llama2_instructions(instructions.encode())
        if found is None:
            raise NativeUnavailable(f"this processor does not support {instructions or 'AVX2 with F16C'}")
        self.instructions: str = found.decode()
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
        self._decoder = library.llama2_decoder_new(model, layers, found, threads)
        if not self._decoder:
            raise NativeUnavailable("out of memory")
        self._max_rows: int = library.llama2_decoder_max_rows(self._decoder)
        self._step_function = library.llama2_decoder_step
        weakref.finalize(self, library.llama2_decoder_free, self._decoder)

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Tensor:  # (vocab_size,)
        """Append tokens to a slot and return the logits after the last one, as in `LlamaModel.prefill`.

        The result has the same bits for any chunk sizes, single tokens included.
        """
        for start in range(0, len(token_ids), self._max_rows):
            chunk = token_ids[start : start + self._max_rows]
            first = position + start
            is_last = start + len(chunk) == len(token_ids)
            logits = self._step([slot] * len(chunk), chunk, range(first, first + len(chunk)), logit_rows=int(is_last))
        return logits[0]

    def decode(self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append one token to each slot and return the logits after each, as in `LlamaModel.decode`.

        Each row has the same bits for any number and content of the other rows.
        """
        return self._step(slots, token_ids, positions, logit_rows=len(slots))

    def _step(
        self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int], logit_rows: int
    ) -> Tensor:  # (logit_rows, vocab_size)
        rows = len(slots)
        logits = torch.empty(logit_rows, self._vocab_size)
        numbers = ctypes.c_int32 * rows
        arguments = (rows, numbers(*slots), numbers(*token_ids), numbers(*positions), logit_rows, logits.data_ptr())
        if not self._step_function(self._decoder, *arguments):
            raise EngineError(f"out of range: tokens {list(token_ids)} at {list(positions)} of slots {list(slots)}")
        return logits


def _model_pointers(
    config: LlamaConfig, weights: LlamaWeights, kv_cache: KVCache, rotary: tuple[Tensor, Tensor]
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
        *(tensor.data_ptr() for tensor in (weights.embedding, weights.norm, weights.head, *rotary)),
    )


def _layer_pointers(layer: LayerWeights, keys: Tensor, values: Tensor) -> LayerPointers:
    matrices = (layer.qkv, layer.output, layer.mlp_norm, layer.gate_up, layer.down)
    return LayerPointers(*(tensor.data_ptr() for tensor in (layer.attention_norm, *matrices, keys, values)))
