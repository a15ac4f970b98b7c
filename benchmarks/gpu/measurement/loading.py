"""The speed of loading safetensors files to the device, compared with a plain read of the same files."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tools.make_checkpoint import Shape, make_checkpoint

from benchmarks.gpu.measurement.ceilings import synchronize
from llama2_server.engine.checkpoint.loader import load_model

# Llama-2-7B with 6 of its 32 layers: large enough to measure, and created in half a minute.
SHAPES = {
    "7b": Shape(hidden=4096, layers=6, heads=32, kv_heads=32, ffn=11008, vocab=32000, context=4096),
    "tiny": Shape(),
}
BLOCK_BYTES = 16 * 2**20


def measure(shape: str, device: str) -> Iterator[dict[str, float]]:
    """Yield bytes per second: the loader from the page cache, a plain read from the disk, and the loader from there."""
    with tempfile.TemporaryDirectory() as folder:
        directory = make_checkpoint(Path(folder), SHAPES[shape], shards=2)
        files = sorted(directory.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        _load_seconds(directory, device)  # the first one also starts CUDA
        yield {"cached_load": size / _load_seconds(directory, device)}
        _evict_from_page_cache(files)
        started_at = time.perf_counter()
        for file in files:
            _read(file)
        yield {"read": size / (time.perf_counter() - started_at)}
        _evict_from_page_cache(files)
        yield {"load": size / _load_seconds(directory, device)}


def _load_seconds(directory: Path, device: str) -> float:
    started_at = time.perf_counter()
    load_model(directory, device=device, dtype=torch.float16, context_length=64, slots=1)
    synchronize(device)
    return time.perf_counter() - started_at


def _read(path: Path) -> None:
    block = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _evict_from_page_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
