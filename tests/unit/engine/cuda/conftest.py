"""The device for the tests of the CUDA engine."""

from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels run in this session."""
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: the Triton kernels; triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
