"""Float16 matrices in memory that take 12 bits per weight if that is exact (native/kernels/packing.hpp)."""

import ctypes
import threading
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama2_server.engine.model.weights import LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import (
    MatrixPointers,
    NativeUnavailable,
    find_instructions,
    load_library,
    use_huge_pages,
)

CpuWeightBits = Literal["auto", "12", "16"]
# Fixed by the instruction set, from the measurements in benchmarks/README.md. Unmeasured sets keep 16 bits.
DEFAULT_BITS = {"AVX-512": "12"}
# Smaller models fit in the processor's cache, where reading fewer bytes does not pay for decoding.
MIN_PACKED_BYTES = 32 * 1024 * 1024

FLOAT16, TWELVE_BITS, TWELVE_BITS_WITH_BASES = range(3)  # enum RowFormat of model.hpp
FORMAT_MASK = 63  # an entry of `rows` is an offset, a multiple of 64, plus the format


class PackedMemoryFull(Exception):
    """The packed weights take more memory than is free; the one-line message states how much is free."""


class PackedMemory:
    """Memory for the packed rows of a model. Only the part that is used so far takes memory of the machine."""

    def __init__(self, capacity_bytes: int, limit_bytes: int | None = None) -> None:
        self._limit = limit_bytes
        self.bytes = torch.empty(capacity_bytes, dtype=torch.uint8)
        use_huge_pages(self.bytes)
        self._used = 0
        self._lock = threading.Lock()

    def reserve(self, size_bytes: int) -> int:
        """Return the offset of free bytes; any thread may call it.

        Raises:
            PackedMemoryFull: the rows take more memory than the limit.
        """
        with self._lock:
            offset = self._used
            self._used += size_bytes
        if self._limit is not None and offset + size_bytes > self._limit:
            raise PackedMemoryFull(
                f"the weights need more than the {self._limit / 1e9:.1f} GB that are free, because too few of them "
                "fit in 12 bits (llama2-server weights check)"
            )
        return offset


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A float16 matrix, or a range of rows of one, of which each row has 12 bits per weight or 16."""

    memory: PackedMemory
    rows: Tensor  # (outputs,) int64: offset and format of each row
    width: int

    dtype = torch.float16

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return len(self.rows), self.width

    def __getitem__(self, rows: slice) -> "PackedMatrix":
        """Return a range of rows that shares the memory."""
        return PackedMatrix(self.memory, self.rows[rows], self.width)

    def pointers(self) -> MatrixPointers:
        """Return the matrix for the C++ code, which must not outlive it."""
        return MatrixPointers(self.memory.bytes.data_ptr(), self.rows.data_ptr())

    def pack(self, first: int, halves: Tensor) -> bool:  # (rows, width), contiguous float16
        """Store rows from row `first` on; return whether all their numbers are finite. Any thread may call it."""
        count = halves.shape[0]
        entries = self.rows[first : first + count]
        size_bytes = measure_rows(halves, entries)
        if size_bytes is None:
            return False
        offset = self.memory.reserve(size_bytes)
        load_library().llama2_pack_rows(
            halves.data_ptr(), count, self.width, entries.data_ptr(), self.memory.bytes.data_ptr(), offset
        )
        return True

    def unpack(self, row: int, instructions: str = "") -> Tensor:  # (width,) float32
        """Return a row."""
        out = torch.empty(-(-self.width // 16) * 16)
        pointers = ctypes.byref(self.pointers())
        load_library().llama2_unpack_row(pointers, row, self.width, instructions.encode(), out.data_ptr())
        return out[: self.width]

    def first_values(self, count: int) -> Tensor:  # (count,) float16
        """Return the first numbers of the matrix."""
        return torch.cat([self.unpack(row) for row in range(min(-(-count // self.width), len(self.rows)))])[
            :count
        ].half()

    @property
    def share(self) -> "PackedShare":
        """The share of weights that are stored in 12 bits."""
        return PackedShare.of(self.rows & FORMAT_MASK, self.width)

    @property
    def nbytes(self) -> int:
        """Memory of the rows and of the table of rows, in bytes."""
        return self.share.size_bytes


@dataclass(frozen=True, slots=True)
class PackedShare:
    """Number of weights, how many of them are stored in 12 bits, and their size in memory in bytes."""

    packed: int = 0
    total: int = 0
    size_bytes: int = 0

    @classmethod
    def of(cls, formats: Tensor, width: int) -> "PackedShare":
        """Return the share of a matrix with rows of these formats, (outputs,) int64."""
        counts: list[int] = torch.bincount(formats, minlength=3).tolist()
        sizes = (count * row_bytes(row_format, width) for row_format, count in enumerate(counts))
        return cls(sum(counts[TWELVE_BITS:]) * width, sum(counts) * width, sum(sizes) + formats.nbytes)

    def __add__(self, other: "PackedShare") -> "PackedShare":
        return PackedShare(self.packed + other.packed, self.total + other.total, self.size_bytes + other.size_bytes)

    def __str__(self) -> str:
        return f"{100 * self.packed / max(self.total, 1):.2f}%"


def measure_rows(halves: Tensor, formats: Tensor) -> int | None:  # (rows, width), contiguous float16; (rows,) int64
    """Write the format of each row; return the bytes of all packed rows, or None if a number is not finite."""
    rows, width = halves.shape
    size = int(load_library().llama2_measure_rows(halves.data_ptr(), rows, width, formats.data_ptr()))
    return None if size < 0 else size


def packs_weights(bits: CpuWeightBits, float16_bytes: int, slots: int) -> bool:
    """Return whether the native kernels read a model of this size in packed form.

    Args:
        bits: the setting; "auto" depends on the instruction set, the size and the slots.
        float16_bytes: size of the weights in float16.
        slots: maximum number of concurrent sequences; steps of several rows are faster at 16 bits.
    """
    try:
        instructions = find_instructions()
    except NativeUnavailable:
        return False
    if bits == "auto":
        return slots == 1 and float16_bytes >= MIN_PACKED_BYTES and DEFAULT_BITS.get(instructions) == "12"
    return bits == "12"


def row_bytes(row_format: int, width: int) -> int:
    """Return the size of a row of a format in bytes."""
    return int(load_library().llama2_row_bytes(row_format, width))


def allocate_packed(config: LlamaConfig, limit_bytes: int | None = None) -> LlamaWeights[PackedMatrix]:
    """Return packed weights whose rows are not packed yet, and which may take `limit_bytes` of memory.

    Raises:
        NativeUnavailable: the native library is missing.
    """
    capacity = 0

    def count(outputs: int, width: int) -> None:
        nonlocal capacity
        capacity += outputs * row_bytes(FLOAT16, width)

    LlamaWeights.arrange(config, count, lambda width: torch.empty(width, device="meta"))
    memory = PackedMemory(capacity, limit_bytes)

    def matrix(outputs: int, width: int) -> PackedMatrix:
        return PackedMatrix(memory, torch.empty(outputs, dtype=torch.int64), width)

    return LlamaWeights.arrange(config, matrix, lambda width: torch.empty(width, dtype=torch.float16))
