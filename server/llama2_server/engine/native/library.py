"""The native library (decode.cpp), called through ctypes, which releases the GIL during a call.

It is built when the package is installed and a C++ compiler is at hand (hatch_build.py). Where it is missing, or the
processor is another one, the model runs in torch.
"""

import ctypes
import functools
from pathlib import Path

from torch import Tensor

LIBRARY = Path(__file__).with_name("decode.so")
INTERFACE = 2  # what decode.cpp's llama2_interface() has to say


class NativeUnavailable(Exception):
    """There is no native decode step here; the message says why and what to do, in one line."""


class LayerPointers(ctypes.Structure):
    """One layer's tensors, as `struct Layer` of model.hpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down", "keys", "values")
    ]


class ModelPointers(ctypes.Structure):
    """The shapes and shared tensors, as `struct Model` of model.hpp."""

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
        ctypes.POINTER(ModelPointers),
        ctypes.POINTER(LayerPointers),
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
