"""Load a checkpoint with the settings of most tests."""

from pathlib import Path
from typing import Any

import torch

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.model.llama import LlamaModel


def load(directory: Path, dtype: torch.dtype = torch.float32, context_length: int = 32, **options: Any) -> LlamaModel:
    """Load on the CPU with one slot."""
    return load_model(directory, device="cpu", dtype=dtype, context_length=context_length, slots=1, **options)
