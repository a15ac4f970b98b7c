"""The configuration cache in a new process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.checkpoints import MakeCheckpoint

SCRIPT = """
import sys
from pathlib import Path
from llama2_server.engine.checkpoint.config_cache import read_metadata
import llama2_server.lifecycle.model_loading
read_metadata(*map(Path, sys.argv[1:]))
print('transformers' in sys.modules)
"""


@pytest.mark.timeout(300)  # two new processes import torch and transformers, which is slow on a busy machine
def test_the_second_start_imports_no_transformers(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The import takes seconds; a process that finds everything in the cache skips it."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(checkpoint() / name, directory)
    command = [sys.executable, "-c", SCRIPT, str(directory), str(tmp_path / "checkpoint.json")]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert outputs == ["True\n", "False\n"]
