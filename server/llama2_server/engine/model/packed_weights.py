"""Float16 matrices in memory that take 12 bits per weight if that is exact, in the layout that the kernels read."""

import ctypes
import threading
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.weight_layout import FLOAT16, ROWS, TWELVE_BITS, WeightLayout
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

FORMAT_MASK = 63  # an entry of a group is an offset, a multiple of 64, plus the format
UNPACKED_PADDING = 128  # floats; the kernels pad an unpacked row with zeros to at most a multiple of this


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
    """A float16 matrix, or a range of rows of one, whose groups of rows have 12 bits per weight or 16."""

    memory: PackedMemory
    entries: Tensor  # (groups,) int64: offset and format of each group of rows
    shape: tuple[int, int]
    """Number of rows and columns."""
    layout: WeightLayout = ROWS

    dtype = torch.float16

    @staticmethod
    def allocate(memory: PackedMemory, rows: int, width: int, layout: WeightLayout) -> "PackedMatrix":
        """Return a matrix whose rows are not packed yet."""
        return PackedMatrix(memory, torch.empty(layout.groups(rows), dtype=torch.int64), (rows, width), layout)

    def __getitem__(self, rows: slice) -> "PackedMatrix":
        """Return a range of rows that shares the memory; it starts with a group and ends with one."""
        start, stop, _ = rows.indices(self.shape[0])
        if stop < self.shape[0]:
            self._group(stop)
        entries = self.entries[self._group(start) : self.layout.groups(stop)]
        return PackedMatrix(self.memory, entries, (stop - start, self.shape[1]), self.layout)

    def _group(self, row: int) -> int:
        """Return the group that a row is the first of."""
        if row % self.layout.group_rows != 0:
            raise EngineError(f"row {row} is not the first of a group of {self.layout.group_rows} rows")
        return row // self.layout.group_rows

    def pointers(self) -> MatrixPointers:
        """Return the matrix for the C++ code, which must not outlive it."""
        return MatrixPointers(self.memory.bytes.data_ptr(), self.entries.data_ptr())

    def pack(self, first: int, halves: Tensor) -> bool:  # (rows, width), contiguous float16
        """Store rows from row `first` on; return whether all their numbers are finite. Any thread may call it.

        The rows are whole groups, except that they may end at the last row of the matrix.
        """
        group = self._group(first)
        entries = self.entries[group : group + self.layout.groups(halves.shape[0])]
        size_bytes = self.layout.measure(halves, entries)
        if size_bytes is None:
            return False
        self.layout.pack(halves, entries, self.memory.bytes, self.memory.reserve(size_bytes))
        return True

    def unpack(self, row: int, instructions: str = "") -> Tensor:  # (width,) float32
        """Return a row."""
        width = self.shape[1]
        out = torch.empty(-(-width // UNPACKED_PADDING) * UNPACKED_PADDING)
        name = (instructions or self.layout.instructions).encode()
        load_library().llama2_unpack_row(ctypes.byref(self.pointers()), row, width, name, out.data_ptr())
        return out[:width]

    def multiply(self, x: Tensor, instructions: str = "") -> Tensor:  # (rows, width) float32 -> (rows, outputs)
        """Return the product with each row of `x`, as a step computes it.

        Raises:
            EngineError: the processor does not support the instructions, or there is not enough memory.
        """
        name = instructions or self.layout.instructions
        x, out = x.contiguous(), torch.empty(len(x), self.shape[0])
        pointers = ctypes.byref(self.pointers())
        if not load_library().llama2_multiply(
            pointers, *self.shape, name.encode(), x.data_ptr(), len(x), out.data_ptr()
        ):
            raise EngineError(f"cannot multiply with {name or 'the native library'}")
        return out

    def first_values(self, count: int) -> Tensor:  # (count,) float16
        """Return the first numbers of the matrix."""
        rows, width = self.shape
        return torch.cat([self.unpack(row) for row in range(min(-(-count // width), rows))])[:count].half()

    @property
    def share(self) -> "PackedShare":
        """The share of weights that are stored in 12 bits."""
        return PackedShare.of(self.entries & FORMAT_MASK, self.shape, self.layout)

    @property
    def nbytes(self) -> int:
        """Memory of the groups and of the table of groups, in bytes."""
        return self.share.size_bytes


@dataclass(frozen=True, slots=True)
class PackedShare:
    """Number of weights, how many of them are stored in 12 bits, and their size in memory in bytes."""

    packed: int = 0
    total: int = 0
    size_bytes: int = 0

    @classmethod
    def of(cls, formats: Tensor, shape: tuple[int, int], layout: WeightLayout) -> "PackedShare":
        """Return the share of a matrix whose groups of rows have these formats, (groups,) int64."""
        rows, width = shape
        counts: list[int] = torch.bincount(formats, minlength=3).tolist()
        size_bytes = sum(count * layout.group_bytes(kind, width) for kind, count in enumerate(counts))
        packed_rows = sum(counts[TWELVE_BITS:]) * layout.group_rows
        if len(formats) and int(formats[-1]) != FLOAT16:
            packed_rows -= layout.groups(rows) * layout.group_rows - rows  # the last group may have fewer rows
        return cls(packed_rows * width, rows * width, size_bytes + formats.nbytes)

    def __add__(self, other: "PackedShare") -> "PackedShare":
        return PackedShare(self.packed + other.packed, self.total + other.total, self.size_bytes + other.size_bytes)

    def __str__(self) -> str:
        return f"{100 * self.packed / max(self.total, 1):.2f}%"


def packs_weights(bits: CpuWeightBits, float16_bytes: int, slots: int) -> bool:
    """Return whether the portable kernels read a model of this size in packed form.

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


def allocate_packed(
    config: LlamaConfig, layout: WeightLayout, limit_bytes: int | None = None
) -> LlamaWeights[PackedMatrix]:
    """Return packed weights whose rows are not packed yet, and which may take `limit_bytes` of memory.

    Raises:
        NativeUnavailable: the native library is missing.
    """
    capacity = 0

    def count(outputs: int, width: int) -> None:
        nonlocal capacity
        capacity += layout.groups(outputs) * layout.group_bytes(FLOAT16, width)

    LlamaWeights.arrange(config, count, lambda width: torch.empty(width, device="meta"))
    memory = PackedMemory(capacity, limit_bytes)

    def matrix(outputs: int, width: int) -> PackedMatrix:
        return PackedMatrix.allocate(memory, outputs, width, layout)

    return LlamaWeights.arrange(config, matrix, lambda width: torch.empty(width, dtype=torch.float16))
