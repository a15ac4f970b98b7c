"""Peak memory of loading a checkpoint, measured in a separate process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.support.checkpoints import MakeCheckpoint

MEASURE = """
import sys, torch
from pathlib import Path
from llama2_server.engine.checkpoint.loader import load_model
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
torch.set_num_threads(1)
tiny, directory = map(Path, sys.argv[1:])
load_model(tiny, device="cpu", dtype=torch.float16, context_length=32, slots=1)  # late imports
before = status("VmRSS")
load_model(directory, device="cpu", dtype=torch.float16, context_length=32, slots=1)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="NOT TESTED: peak memory is read from Linux's /proc")
@pytest.mark.timeout(300)  # a new process imports torch and transformers, which is slow on a busy machine
def test_loading_takes_no_more_memory_than_the_weights(checkpoint: MakeCheckpoint) -> None:
    """The peak stays below 1.15 times the size of the weights.

    100 MB are enough: a second copy of any large tensor, or the pages of a mapped file, would exceed the bound.
    """
    directory = checkpoint(dtype=torch.float16, hidden=1024, layers=4, heads=16, kv_heads=16, ffn=2816, vocab=600)
    weights_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(checkpoint()), str(directory)]
    peak_bytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.95 * weights_bytes < peak_bytes < 1.15 * weights_bytes
