"""The prefill chunk of each card."""

import pytest

from llama2_server.engine.model.prefill_chunks import CHUNK_SECONDS, MATMUL_TERAOPS, cuda_chunk_tokens

LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320


@pytest.mark.parametrize(
    ("card", "parameters", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", LLAMA_7B, 2048),
        ("NVIDIA H100 PCIe", LLAMA_7B, 1024),
        ("NVIDIA H200", LLAMA_7B, 2048),
        ("NVIDIA H200", LLAMA_13B, 1024),
        ("NVIDIA A100-SXM4-80GB", LLAMA_7B, 512),
        ("NVIDIA L4", LLAMA_7B, 256),
        ("NVIDIA L40S", LLAMA_7B, 512),
        ("Tesla T4", LLAMA_7B, 128),
        ("NVIDIA H200", 1_000_000, 2048),  # no more, because only whole chunks are reused
        ("Tesla T4", 70 * LLAMA_7B, 64),
        ("NVIDIA RTX A1000", LLAMA_7B, 512),  # not an A100: unknown
        ("another card", LLAMA_7B, 512),
    ],
)
def test_chunks_by_card(card: str, parameters: int, expected: int) -> None:
    """A large card gets large chunks, a large model small ones, and an unknown card 512."""
    assert cuda_chunk_tokens(card, parameters) == expected


def test_a_chunk_takes_at_most_50_ms_at_the_rate_of_the_table() -> None:
    """This holds for each card of the table with 7B."""
    for card, teraops in MATMUL_TERAOPS.items():
        seconds = cuda_chunk_tokens(f"NVIDIA {card}", LLAMA_7B) * 2 * LLAMA_7B / (teraops * 1e12)
        assert seconds <= CHUNK_SECONDS
