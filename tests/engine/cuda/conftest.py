"""Where there is no GPU, Triton's interpreter runs the kernels; it has to be asked for before Triton is imported."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session."""
    if find_spec("triton") is None:
        pytest.skip("NOT TESTED: the Triton kernels, for there is no triton here")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
