"""The device of the CUDA engine's tests."""

from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session."""
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: the Triton kernels, for there is no triton here")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
