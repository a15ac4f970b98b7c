"""The way of a tensor's bytes from its file to its place on the device."""

import itertools
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

# What is read at a time. Mapped files would count towards the process's memory until they are unmapped; this does not.
BLOCK_BYTES = 4 * 2**20


class ReadBuffers:
    """Blocks of memory that a file is read into; on CUDA one is read into while the other is on its way."""

    def __init__(self, device: torch.device) -> None:
        self._blocks = itertools.cycle([_Block(device) for _ in range(2 if device.type == "cuda" else 1)])

    def fill(self, place: Tensor, dtype: torch.dtype, file: BufferedReader) -> bool:
        """Read a contiguous tensor from where the file stands, stored as `dtype`; whether all its numbers are finite.

        Raises EOFError where the file ends too early.
        """
        flat = place.view(-1)  # rows of a fused matrix follow one another
        extremes: list[Tensor] = []
        step = BLOCK_BYTES // dtype.itemsize
        for start in range(0, flat.shape[0], step):
            target = flat[start : start + step]
            next(self._blocks).bring(target, dtype, file)
            # The extremes tell of NaN and infinity alike, and cost a fiftieth of looking at each number.
            extremes += torch.aminmax(target)
        return bool(torch.stack(extremes).isfinite().all()) if extremes else True


class _Block:
    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._device = device
        self._memory = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=on_cuda)
        self._bytes: Any = self._memory.numpy()  # the same memory, as what a file reads into
        self._sent = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def bring(self, target: Tensor, dtype: torch.dtype, file: BufferedReader) -> None:
        if self._sent:
            self._sent.synchronize()
        size_bytes = target.shape[0] * dtype.itemsize
        # Straight into its place where it stays as it is: each page is touched once.
        stays = self._device.type == "cpu" and target.dtype == dtype
        into: Any = target.view(torch.uint8).numpy() if stays else self._bytes[:size_bytes]
        if file.readinto(into) != size_bytes:
            raise EOFError
        if stays:
            return
        # As it is stored: the device converts it, if need be.
        target.copy_(self._memory[:size_bytes].view(dtype).to(self._device, non_blocking=True))
        if self._sent:
            self._sent.record()
