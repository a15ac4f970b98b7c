"""How the rows of a packed matrix are stored: one by one, or 16 of them in tiles."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from llama2_server.engine.native.library import load_library

FLOAT16, TWELVE_BITS, TWELVE_BITS_WITH_BASES = range(3)  # enum RowFormat of model.hpp
AMX = "AMX"
"""The name of the instruction set that reads tiles."""


class WeightLayout(ABC):
    """How a matrix is stored in groups of rows. Each group has an entry: its offset in memory plus its format."""

    kernels: str
    """The family of kernels that reads this layout."""
    instructions: str
    """The instruction set that reads it; "" for every set of the family."""
    twelve_bits: bool
    """Whether groups have 12 bits per weight if that is exact."""
    group_rows: int
    """Rows per group; the last group of a matrix can have fewer."""

    def groups(self, rows: int) -> int:
        """Return the number of groups of this number of rows."""
        return -(-rows // self.group_rows)

    @abstractmethod
    def group_bytes(self, group_format: int, width: int) -> int:
        """Return the size of a group of a format in bytes."""

    @abstractmethod
    def measure(self, halves: Tensor, entries: Tensor) -> int | None:  # (rows, width), contiguous float16; (groups,)
        """Write the format of each group; return the bytes of all groups, or None if a number is not finite."""

    @abstractmethod
    def pack(self, halves: Tensor, entries: Tensor, memory: Tensor, offset: int) -> None:
        """Store measured rows from `offset` on, and add their offsets to the entries."""


class RowLayout(WeightLayout):
    """Single rows, for the portable kernels: float16, or 12 bits per weight if that is exact (kernels/packing.hpp)."""

    kernels = "portable"
    instructions = ""
    twelve_bits = True
    group_rows = 1

    def group_bytes(self, group_format: int, width: int) -> int:
        """Return the size of a row of a format in bytes."""
        return int(load_library().llama2_row_bytes(group_format, width))

    def measure(self, halves: Tensor, entries: Tensor) -> int | None:
        """Write the format of each row, as in `WeightLayout.measure`."""
        return _finite(load_library().llama2_measure_rows(halves.data_ptr(), *halves.shape, entries.data_ptr()))

    def pack(self, halves: Tensor, entries: Tensor, memory: Tensor, offset: int) -> None:
        """Store measured rows, as in `WeightLayout.pack`."""
        pointers = entries.data_ptr(), memory.data_ptr(), offset
        load_library().llama2_pack_rows(halves.data_ptr(), *halves.shape, *pointers)


@dataclass(frozen=True, slots=True)
class TileLayout(WeightLayout):
    """Groups of 16 rows in tiles, for the AMX kernels: 12 bits per weight if that is exact for the whole group.

    Without `twelve_bits`, all groups have 16 bits per weight.
    """

    twelve_bits: bool = True

    kernels = "amx"
    instructions = AMX
    group_rows = 16

    def group_bytes(self, group_format: int, width: int) -> int:
        """Return the size of a group of a format in bytes; missing rows and columns take memory, too."""
        return int(load_library().llama2_tile_bytes(group_format, width))

    def measure(self, halves: Tensor, entries: Tensor) -> int | None:
        """Write the format of each group, as in `WeightLayout.measure`."""
        measure = load_library().llama2_measure_tiles
        return _finite(measure(halves.data_ptr(), *halves.shape, self.twelve_bits, entries.data_ptr()))

    def pack(self, halves: Tensor, entries: Tensor, memory: Tensor, offset: int) -> None:
        """Store measured groups, as in `WeightLayout.pack`."""
        pointers = entries.data_ptr(), memory.data_ptr(), offset
        load_library().llama2_pack_tiles(halves.data_ptr(), *halves.shape, *pointers)


ROWS = RowLayout()


def _finite(size_bytes: int) -> int | None:
    return None if size_bytes < 0 else size_bytes
