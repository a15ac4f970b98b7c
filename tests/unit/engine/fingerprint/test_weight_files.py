"""The digest of the weights' files: remembered by name, size and time, and never the digest of other files."""

import hashlib
import logging
import os
import threading
from pathlib import Path

import pytest

from llama2_server.engine.fingerprint import weights
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.fingerprint.weights import WeightFiles, add_weights

QUICK = "quick"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two files of weights; the first is larger than one read."""
    paths = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    paths[0].write_bytes(bytes(range(256)) * 5000)
    paths[1].write_bytes(b"weights")
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list of the files that are read."""
    found: list[Path] = []
    sha256 = weights._sha256

    def count(path: Path) -> str:
        found.append(path)
        return sha256(path)

    monkeypatch.setattr(weights, "_sha256", count)
    return found


def test_every_byte_counts(paths: list[Path], tmp_path: Path) -> None:
    """The digest is that of the list that sha256sum prints; the order of the names does not matter."""
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert WeightFiles(reversed(paths)).hash(tmp_path / "cache", QUICK) == expected
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    assert WeightFiles(paths).hash(tmp_path / "cache", QUICK) != expected


def test_a_restart_reads_nothing(paths: list[Path], tmp_path: Path, reads: list[Path]) -> None:
    """A second start finds the digest on disk, and has its fingerprint before it serves."""
    digest = WeightFiles(paths).hash(tmp_path / "cache", QUICK)
    assert reads == paths
    fingerprint = Fingerprint({}, QUICK)
    add_weights(fingerprint, WeightFiles(paths), tmp_path / "cache", QUICK)
    assert reads == paths
    assert fingerprint.inputs == {"weights": digest}


@pytest.mark.parametrize("change", ["size", "time", "name", "quick digest"])
def test_changed_files_are_read_again(paths: list[Path], tmp_path: Path, change: str) -> None:
    """Each of name, size and time, and the numbers in memory, make the remembered digest unknown."""
    cache = tmp_path / "cache"
    WeightFiles(paths).hash(cache, QUICK)
    status = paths[1].stat()
    if change == "size":
        paths[1].write_bytes(b"other weights")
        os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "name":
        paths[1] = paths[1].rename(tmp_path / "model-3.safetensors")
    quick = "other" if change == "quick digest" else QUICK
    assert WeightFiles(paths).known_digest(cache, quick) is None


def test_files_that_changed_after_loading_have_no_digest(
    paths: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The digest would be that of other weights than those in memory."""
    files = WeightFiles(paths)
    paths[1].write_bytes(b"other weights")
    assert files.hash(tmp_path / "cache", QUICK) is None
    assert "no fingerprint: the weights' files have changed" in caplog.text
    paths[1].unlink()
    assert files.hash(tmp_path / "cache", QUICK) is None
    assert "no fingerprint: the weights' files cannot be read" in caplog.text


def test_changed_files_end_the_wait_for_a_fingerprint(paths: list[Path], tmp_path: Path) -> None:
    """There is no fingerprint then, and none will come."""
    fingerprint, files = Fingerprint({}, QUICK), WeightFiles(paths)
    paths[1].write_bytes(b"other weights")
    add_weights(fingerprint, files, tmp_path / "cache", QUICK)
    for thread in threading.enumerate():
        if thread.name == "fingerprint":
            thread.join()
    assert (fingerprint.value, fingerprint.is_pending) == (None, False)


def test_hashing_waits_for_every_other_thread(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller goes on without a fingerprint; on Linux, only the hashing thread has the lowest priority."""
    gate, priorities = threading.Event(), []

    def sha256(path: Path) -> str:
        gate.wait()
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return path.name

    monkeypatch.setattr(weights, "_sha256", sha256)
    fingerprint = Fingerprint({}, QUICK)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    add_weights(fingerprint, WeightFiles(paths), tmp_path / "cache", QUICK)
    assert (fingerprint.value, fingerprint.is_pending) == (None, True)
    identity = fingerprint.cache_identity
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "fingerprint")
    gate.set()
    thread.join()
    assert fingerprint.value == fingerprint.cache_identity != identity
    assert not fingerprint.is_pending
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    if os.uname().sysname == "Linux":
        assert set(priorities) == {19}


def test_no_fingerprint_where_bits_depend_on_neighbors(
    paths: list[Path], tmp_path: Path, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is read then, and the log has the reason; the response cache still has an identity."""
    caplog.set_level(logging.INFO)
    fingerprint = Fingerprint({}, QUICK, depends_on_neighbors=True)
    add_weights(fingerprint, WeightFiles(paths), tmp_path / "cache", QUICK)
    assert (fingerprint.value, fingerprint.is_pending, reads) == (None, False, [])
    assert "the text of a reply can depend on the other running requests" in caplog.text
    fingerprint.set_weights("known")
    assert fingerprint.value is None
    assert fingerprint.cache_identity == Fingerprint({}, QUICK).cache_identity
