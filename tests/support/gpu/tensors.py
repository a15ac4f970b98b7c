"""Tensors and comparisons for the tests of GPU kernels."""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
HEADS = {"multi-head": (4, 4, 16), "grouped": (8, 2, 32), "one key head": (3, 1, 24)}
"""Numbers of heads and of key heads, and the size of a head."""


class RandomTensors:
    """A factory of random tensors of one device and dtype, the same in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype

    def __call__(self, *shape: int) -> Tensor:
        """Return a tensor of normally distributed numbers."""
        return torch.randn(*shape, generator=self._generator).to(self._device, self._dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Check the shape, and that the relative Euclidean error is within the tolerance of the dtype."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= TOLERANCE[dtype] * expected.double().norm()
