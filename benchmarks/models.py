"""The made weights of the benchmark, by name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tools.make_checkpoint import PRESETS, make_checkpoint


@dataclass(frozen=True)
class Model:
    """Random float16 weights; by default with two properties of published ones that decide the speed."""

    preset: str
    trained_dtype: torch.dtype = torch.bfloat16
    """The weights are rounded to this first, as Llama-2's were."""
    logit_deviation: float = 4.0
    """Standard deviation of the logits of one token; trained models have 3 to 5, so that few tokens are likely."""

    @property
    def folder_name(self) -> str:
        """A name that differs if any weight does."""
        return f"{self.preset}-{str(self.trained_dtype).removeprefix('torch.')}-{self.logit_deviation:g}"


MODELS = {
    "134m": Model("134m"),
    "1.2b": Model("1.2b"),
    # A third of the vocabulary is likely, which is the most work for a sampler.
    "134m-flat": Model("134m", logit_deviation=1.0),
    # With all 11 bits of float16, as after some fine-tuning or merging, so that they stay at 16 bits.
    "134m-float16": Model("134m", trained_dtype=torch.float16),
}


def make_model(directory: Path, model: Model) -> None:
    """Write the checkpoint of a model."""
    make_checkpoint(
        directory, PRESETS[model.preset], trained_dtype=model.trained_dtype, logit_deviation=model.logit_deviation
    )
