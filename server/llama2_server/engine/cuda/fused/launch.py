"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits for its results."""

from typing import Any

import torch

MIN_CAPABILITY = (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments with which each kernel of a fused step is launched on this device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
