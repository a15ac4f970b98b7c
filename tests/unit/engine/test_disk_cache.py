"""The cache files of a start: a value is found under its key, and an interrupted write keeps the old file."""

import signal
import subprocess
import sys
from pathlib import Path

from llama2_server.engine import disk_cache

KILLED_IN_SAVE = """
import resource, signal, sys
from pathlib import Path
from llama2_server.engine import disk_cache

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
disk_cache.save(Path(sys.argv[1]), "key", "new" * 1000)
"""
"""The kernel ends this program after the first 1000 bytes of the file."""


def test_value_is_found_under_its_key(tmp_path: Path) -> None:
    """Another key finds nothing, and the folder has only the file."""
    file = tmp_path / "folder" / "cache.json"
    disk_cache.save(file, "key", [1, 2])
    disk_cache.save(file, "key", [3])
    assert disk_cache.load(file, "key") == [3]
    assert disk_cache.load(file, "other") is None
    assert list(file.parent.iterdir()) == [file]


def test_a_process_that_is_killed_in_a_save_keeps_the_old_value(tmp_path: Path) -> None:
    """Otherwise the next start would hash the weights again, and could not continue replies in the meantime."""
    file = tmp_path / "cache.json"
    disk_cache.save(file, "key", "old")
    ended = subprocess.run([sys.executable, "-c", KILLED_IN_SAVE, str(file)], check=False)
    assert ended.returncode == -signal.SIGXFSZ
    assert disk_cache.load(file, "key") == "old"
