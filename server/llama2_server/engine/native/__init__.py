"""The CPU's own forward pass, in C++ (decode.cpp), called through ctypes, which lets go of Python's lock meanwhile.

It is built when the package is installed and a C++ compiler is at hand (hatch_build.py). Where it is missing, or the
processor is another one, the model runs in torch.
"""

import ctypes
import functools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineFault

if TYPE_CHECKING:
    from llama2_server.engine.kv_cache import KVCache
    from llama2_server.engine.parameters import LlamaConfig, LlamaWeights

LIBRARY = Path(__file__).with_name("decode.so")
INTERFACE = 2  # what decode.cpp's llama2_interface() has to say


class NativeUnavailable(Exception):
    """There is no native decode step here; the message says why and what to do, in one line."""


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down", "keys", "values")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("vocab", "hidden", "inner", "layers", "heads", "kv_heads", "head_dim", "context", "slots")
        ),
        ("norm_epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head", "cosines", "sines")),
    ]


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library beside this file; raises NativeUnavailable where there is none that this process can use."""
    if not LIBRARY.exists():
        raise NativeUnavailable("it was not built: install a C++ compiler, then the server anew")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise NativeUnavailable(f"it cannot be loaded: {error}") from error
    if library.llama2_interface() != INTERFACE:
        raise NativeUnavailable("it was built from another version: install the server anew")
    numbers = ctypes.POINTER(ctypes.c_int32)
    library.llama2_instructions.argtypes = [ctypes.c_char_p]
    library.llama2_instructions.restype = ctypes.c_char_p
    library.llama2_decoder_new.argtypes = [
        ctypes.POINTER(_Model),
        ctypes.POINTER(_Layer),
        ctypes.c_char_p,
        ctypes.c_int,
    ]
    library.llama2_decoder_new.restype = ctypes.c_void_p
    library.llama2_decoder_free.argtypes = [ctypes.c_void_p]
    library.llama2_decoder_free.restype = None
    library.llama2_decoder_most_rows.argtypes = [ctypes.c_void_p]
    library.llama2_decoder_step.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, numbers, numbers, numbers),
        *(ctypes.c_int, ctypes.c_void_p),
    ]
    library.llama2_decoder_step.restype = ctypes.c_bool
    library.llama2_use_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.llama2_use_huge_pages.restype = None
    library.llama2_read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.llama2_read_bandwidth.restype = ctypes.c_double
    return library


def use_huge_pages(memory: Tensor) -> None:
    """Ask for huge pages under a tensor that nothing has been written to yet; where there are none, nothing happens."""
    try:
        load_library().llama2_use_huge_pages(memory.data_ptr(), memory.nbytes)
    except NativeUnavailable:
        return


def read_bandwidth(memory: Tensor, threads: int) -> float:
    """Bytes a second at which `threads` threads read the tensor's memory once."""
    return float(load_library().llama2_read_bandwidth(memory.data_ptr(), memory.nbytes, threads))


class NativeDecoder:
    """The decode step of one float16 model on the CPU, over the model's own weights and KV cache."""

    def __init__(
        self,
        config: "LlamaConfig",
        weights: "LlamaWeights",
        kv_cache: "KVCache",
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
        model = _Model(
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
        layers = (_Layer * config.layers)(
            *(
                _Layer(
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
            raise EngineFault(f"tokens {list(token_ids)} at {list(positions)} of slots {list(slots)}")
        return logits
