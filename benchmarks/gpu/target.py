"""The target of a run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A shape of SHAPES, a device of torch, and the number of simultaneous requests."""

    shape: str
    device: str
    rows: int

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU; otherwise the run only tests the benchmark itself."""
        return self.device == "cuda"
