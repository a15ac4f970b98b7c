"""The memory of the KV cache."""

from pathlib import Path

import pytest
import torch

from llama2_server.engine.model.kv_cache import KVCache
from llama2_server.engine.model.weights import LlamaConfig
from llama2_server.engine.native.library import NativeUnavailable, load_library

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_positions=64 * 1024,
    tied_embeddings=False,
)
SMAPS = Path("/proc/self/smaps")


def flags_of(address: int) -> list[str]:
    """Return the flags of the mapped memory that has an address."""
    found = False
    for line in SMAPS.read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            found = begin <= address < end
        elif found and first == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not SMAPS.exists(), reason="needs Linux' huge pages"
)
def test_the_cache_requests_huge_pages() -> None:
    """Its memory is advised, so that attention needs few page-table lookups."""
    try:
        load_library()
    except NativeUnavailable:
        pytest.skip("needs the native library")
    cache = KVCache(CONFIG, slots=2, context_length=64 * 1024, like=torch.empty(0, dtype=torch.float16))
    middle = cache.keys[0].data_ptr() + cache.nbytes // 2
    assert "hg" in flags_of(middle)
