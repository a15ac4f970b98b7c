"""The ctypes binding of the native library (decode.cpp). ctypes releases the GIL during a call.

hatch_build.py builds the library when the package is installed, if a C++ compiler is available. If the library is
missing or does not support the processor, the model runs in torch.
"""

import ctypes
import functools
from pathlib import Path

from torch import Tensor

LIBRARY = Path(__file__).with_name("decode.so")
INTERFACE_VERSION = 7  # the version that llama2_interface() of decode.cpp must return


class NativeUnavailable(Exception):
    """The native forward pass cannot run; the one-line message gives the reason and the fix."""


class MatrixPointers(ctypes.Structure):
    """A weight matrix; mirrors `struct Matrix` of model.hpp."""

    _fields_ = [("memory", ctypes.c_void_p), ("rows", ctypes.c_void_p)]


class LayerPointers(ctypes.Structure):
    """Tensors of one layer; mirrors `struct Layer` of model.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm")),
        *((name, MatrixPointers) for name in ("qkv", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]


class ModelPointers(ctypes.Structure):
    """Shapes and shared tensors of a model; mirrors `struct Model` of model.hpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("vocab", "hidden", "inner", "layers", "heads", "kv_heads", "head_dim", "context", "slots")
        ),
        ("norm_epsilon", ctypes.c_float),
        *((name, MatrixPointers) for name in ("embedding", "head")),
        *((name, ctypes.c_void_p) for name in ("norm", "cosines", "sines")),
    ]


class SamplingParams(ctypes.Structure):
    """Sampling parameters of one sequence; mirrors `struct SamplingParams` of sampling.hpp."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty")),
        ("repetition_penalty", ctypes.c_float),
        ("top_k", ctypes.c_int32),
    ]


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the library that lies next to this file.

    Raises:
        NativeUnavailable: the library is missing, damaged or outdated.
    """
    if not LIBRARY.exists():
        raise NativeUnavailable("the native library was not built; install a C++ compiler and reinstall llama2-grpc")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise NativeUnavailable(f"the native library cannot be loaded: {error}; reinstall llama2-grpc") from error
    if library.llama2_interface() != INTERFACE_VERSION:
        raise NativeUnavailable("the native library was built from another version; reinstall llama2-grpc")
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Declare the arguments and results of the library's functions."""
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
    library.llama2_decoder_max_rows.argtypes = [ctypes.c_void_p]
    handles, doubles = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_double)
    library.llama2_decoder_step.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, numbers, numbers, numbers),
        *(ctypes.c_int, ctypes.c_void_p, handles, doubles, numbers),
    ]
    library.llama2_decoder_step.restype = ctypes.c_bool
    library.llama2_sampler_new.argtypes = [ctypes.c_int, ctypes.POINTER(SamplingParams), numbers, ctypes.c_int]
    library.llama2_sampler_new.restype = ctypes.c_void_p
    library.llama2_sampler_free.argtypes = [ctypes.c_void_p]
    library.llama2_sampler_free.restype = None
    library.llama2_sampler_sample.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, doubles, numbers),
    ]
    library.llama2_sampler_sample.restype = ctypes.c_bool
    library.llama2_prefill_rows.argtypes = [ctypes.c_char_p]
    _declare_packing(library)
    library.llama2_use_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.llama2_use_huge_pages.restype = None
    library.llama2_read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.llama2_read_bandwidth.restype = ctypes.c_double


def _declare_packing(library: ctypes.CDLL) -> None:
    rows = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    library.llama2_measure_rows.argtypes = [*rows]
    library.llama2_measure_rows.restype = ctypes.c_int64
    library.llama2_pack_rows.argtypes = [*rows, ctypes.c_void_p, ctypes.c_uint64]
    library.llama2_pack_rows.restype = None
    library.llama2_row_bytes.argtypes = [ctypes.c_int, ctypes.c_int]
    library.llama2_row_bytes.restype = ctypes.c_int64
    library.llama2_measure_tiles.argtypes = [*rows[:3], ctypes.c_bool, ctypes.c_void_p]
    library.llama2_measure_tiles.restype = ctypes.c_int64
    library.llama2_pack_tiles.argtypes = [*rows, ctypes.c_void_p, ctypes.c_uint64]
    library.llama2_pack_tiles.restype = None
    library.llama2_tile_bytes.argtypes = [ctypes.c_int, ctypes.c_int]
    library.llama2_tile_bytes.restype = ctypes.c_int64
    library.llama2_unpack_row.argtypes = [
        *(ctypes.POINTER(MatrixPointers), ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p),
    ]
    library.llama2_unpack_row.restype = ctypes.c_bool
    library.llama2_multiply.argtypes = [
        *(ctypes.POINTER(MatrixPointers), ctypes.c_int, ctypes.c_int, ctypes.c_char_p),
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
    ]
    library.llama2_multiply.restype = ctypes.c_bool


def find_instructions(name: str = "") -> str:
    """Return the instruction set of this name, or the best available one of the portable kernels.

    Raises:
        NativeUnavailable: the library is missing, or the processor does not support the instructions.
    """
    found: bytes | None = load_library().llama2_instructions(name.encode())
    if found is None:
        raise NativeUnavailable(f"this processor does not support {name or 'AVX2 with F16C'}")
    return found.decode()


def prefill_rows(instructions: str) -> int:
    """Return the number of prompt tokens per step that suits the kernels of an instruction set."""
    return int(load_library().llama2_prefill_rows(instructions.encode()))


def use_huge_pages(memory: Tensor) -> None:
    """Request huge pages for a tensor that is not written to yet; do nothing if they are not available."""
    try:
        load_library().llama2_use_huge_pages(memory.data_ptr(), memory.nbytes)
    except NativeUnavailable:
        return


def read_bandwidth(memory: Tensor, threads: int) -> float:
    """Return the bytes per second at which `threads` threads read the tensor's memory once."""
    return float(load_library().llama2_read_bandwidth(memory.data_ptr(), memory.nbytes, threads))
