"""The native forward pass on a CPU (decode.cpp), over the model's own weights and KV cache."""

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.kv_cache import KVCache
from llama2_server.engine.model.weights import LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import LayerPointers, ModelPointers, NativeUnavailable, load_library


class NativeDecoder:
    """The decode step of one float16 model on the CPU, over the model's own weights and KV cache."""

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
        """`rotary` are cosines and signed sines, (context_length, head_dim); `instructions` "" picks the best.

        Raises NativeUnavailable where the library is missing or the processor lacks the instructions.
        """
        library = load_library()
        found = library.llama2_instructions(instructions.encode())
        if found is None:
            raise NativeUnavailable(f"this processor has no {instructions or 'AVX2 with F16C'}")
        self.instructions: str = found.decode()
        slots, _, context, _ = kv_cache.keys[0].shape
        cosines, sines = (table.float().contiguous() for table in rotary)
        # The C++ side keeps pointers only: what they point to must live as long.
        self._memory = (weights, kv_cache, cosines, sines)
        self._vocab_size = config.vocab_size
        model = ModelPointers(
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
            *(tensor.data_ptr() for tensor in (weights.embedding, weights.norm, weights.head, cosines, sines)),
        )
        layers = (LayerPointers * config.layers)(
            *(
                LayerPointers(
                    *(
                        tensor.data_ptr()
                        for tensor in (
                            layer.attention_norm,
                            layer.qkv,
                            layer.output,
                            layer.mlp_norm,
                            layer.gate_up,
                            layer.down,
                            keys,
                            values,
                        )
                    )
                )
                for layer, keys, values in zip(weights.layers, kv_cache.keys, kv_cache.values, strict=True)
            )
        )
        self._decoder = library.llama2_decoder_new(model, layers, found, threads)
        if not self._decoder:
            raise NativeUnavailable("its memory could not be had")
        self._most_rows: int = library.llama2_decoder_most_rows(self._decoder)
        self._step_function = library.llama2_decoder_step
        weakref.finalize(self, library.llama2_decoder_free, self._decoder)

    def prefill(self, slot: int, token_ids: Sequence[int], position: int) -> Tensor:  # (vocab_size,)
        """As `LlamaModel.prefill`; the same bit for bit in whatever pieces the tokens come, or one by one."""
        for start in range(0, len(token_ids), self._most_rows):
            piece = token_ids[start : start + self._most_rows]
            first = position + start
            last = start + len(piece) == len(token_ids)
            logits = self._step([slot] * len(piece), piece, range(first, first + len(piece)), wanted=int(last))
        return logits[0]

    def decode(self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `LlamaModel.decode`; each row is the same bit for bit whatever the others, and however many they are."""
        return self._step(slots, token_ids, positions, wanted=len(slots))

    def _step(
        self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int], wanted: int
    ) -> Tensor:  # (wanted, vocab_size)
        rows = len(slots)
        logits = torch.empty(wanted, self._vocab_size)
        numbers = ctypes.c_int32 * rows
        arguments = (rows, numbers(*slots), numbers(*token_ids), numbers(*positions), wanted, logits.data_ptr())
        if not self._step_function(self._decoder, *arguments):
            raise EngineError(f"tokens {list(token_ids)} at {list(positions)} of slots {list(slots)}")
        return logits
