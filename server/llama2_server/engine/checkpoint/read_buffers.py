"""Buffers between the file of a tensor and its destination on the device."""

import itertools
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from llama2_server.engine.checkpoint.files import TensorEntry

# Files are read into buffers of this size. Mapped files would count as memory of the process until they are unmapped.
BUFFER_BYTES = 4 * 2**20
# Rows that are packed together stay in a core's cache.
PACKED_BUFFER_BYTES = 2**20
# Number of threads that read tensors. On a CPU, one thread would spend more time on new memory pages than on reading.
# On a GPU, one thread copies less from the page cache than the bus to the card can transfer.
CPU_READERS, CUDA_READERS = 2, 4


def reader_threads(device: torch.device) -> int:
    """Return the number of threads that read tensors to a device."""
    return CUDA_READERS if device.type == "cuda" else CPU_READERS


def equal_in_file(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two stored tensors have the same shape and values, in any dtypes; both files are read once."""
    if one.shape != other.shape:
        return False
    elements = one.size_bytes // one.dtype.itemsize
    step = BUFFER_BYTES // torch.float32.itemsize
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, elements, step):
            count = min(step, elements - start)
            if not torch.equal(_read_float32(first, one.dtype, count), _read_float32(second, other.dtype, count)):
                return False
    return True


def _read_float32(file: BufferedReader, dtype: torch.dtype, count: int) -> Tensor:
    return torch.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype=dtype).float()


class ReadBuffers:
    """Buffers of one thread that a file is read into; on CUDA, one is read into while the device copies the other.

    Each thread copies on its own stream, so that the device does not wait for the slowest reader.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = itertools.cycle([_Buffer(device) for _ in range(2 if on_cuda else 1)])

    def fill(self, destination: Tensor, dtype: torch.dtype, file: BufferedReader) -> bool:
        """Read a contiguous tensor, stored as `dtype`, from the current position of the file.

        Return whether all its numbers are finite in the dtype of `destination`.

        Raises:
            EOFError: the file ends inside the tensor.
        """
        flat = destination.view(-1)  # parts of a fused matrix are contiguous rows
        extremes: list[Tensor] = []
        step = BUFFER_BYTES // dtype.itemsize
        with torch.cuda.stream(self._stream):  # without a stream, this changes nothing
            for start in range(0, flat.shape[0], step):
                target = flat[start : start + step]
                next(self._buffers).copy_into(target, dtype, file)
                # Minimum and maximum reveal NaN and infinity, in a fiftieth of the time of checking each number.
                extremes += torch.aminmax(target)
            # The result waits for the stream, so that other streams may read the weights from here on.
            return bool(torch.stack(extremes).isfinite().all()) if extremes else True

    def read_rows(self, tensor: TensorEntry, file: BufferedReader, group_rows: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Read a matrix from the current position of the file; yield blocks of rows, each with its first row's index.

        The blocks are (rows, width), float16, and valid until the next one. Each has a multiple of `group_rows` rows,
        except the last one.

        Raises:
            EOFError: the file ends inside the tensor.
        """
        outputs, width = tensor.shape
        groups = PACKED_BUFFER_BYTES // (width * tensor.dtype.itemsize * group_rows)
        step = max(groups, 1) * group_rows
        for first in range(0, outputs, step):
            count = min(step, outputs - first)
            stored = next(self._buffers).read(count * width * tensor.dtype.itemsize, file)
            yield first, stored.view(tensor.dtype).to(torch.float16).view(count, width)


class _Buffer:
    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._device = device
        self._memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=on_cuda)
        self._bytes: Any = self._memory.numpy()  # the same memory, in the form that `readinto` accepts
        # A blocking event, because any other keeps a core busy that another thread could read with.
        self._copied = torch.cuda.Event(blocking=True) if on_cuda else None  # type: ignore[no-untyped-call]

    def read(self, size_bytes: int, file: BufferedReader) -> Tensor:  # (size_bytes,) uint8
        """Read bytes into the buffer and return them."""
        if size_bytes > self._memory.nbytes:  # a group of very wide rows
            self._memory = torch.empty(size_bytes, dtype=torch.uint8)
            self._bytes = self._memory.numpy()
        if file.readinto(self._bytes[:size_bytes]) != size_bytes:
            raise EOFError
        return self._memory[:size_bytes]

    def copy_into(self, target: Tensor, dtype: torch.dtype, file: BufferedReader) -> None:
        if self._copied:
            self._copied.synchronize()
        size_bytes = target.shape[0] * dtype.itemsize
        # On the CPU, unconverted numbers are read directly into the target, so that each page is written once.
        direct = self._device.type == "cpu" and target.dtype == dtype
        destination: Any = target.view(torch.uint8).numpy() if direct else self._bytes[:size_bytes]
        if file.readinto(destination) != size_bytes:
            raise EOFError
        if direct:
            return
        # Copied in the stored dtype; the device converts it if necessary.
        target.copy_(self._memory[:size_bytes].view(dtype).to(target.device, non_blocking=True))
        if self._copied:
            self._copied.record()
