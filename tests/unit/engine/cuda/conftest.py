"""The device for the tests of the CUDA engine."""

from importlib.util import find_spec

import pytest
import torch
from tests.support.gpu.tensors import RandomTensors


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels run in this session."""
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: the Triton kernels; triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of the tensors of a kernel."""
    dtype: torch.dtype = request.param
    return dtype


@pytest.fixture
def random(device: torch.device, dtype: torch.dtype) -> RandomTensors:
    """Random tensors of the dtype on the device."""
    return RandomTensors(device, dtype)
