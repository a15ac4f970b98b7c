"""The table of `make bench-gpu` from its results."""

from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.models import SHAPES, cached_a_token, multiplications_a_token, read_a_token
from benchmarks.gpu.packages import NAMES, pinned
from benchmarks.gpu.chart import picture
from benchmarks.gpu.report import LINES, report


def results(**more: Any) -> dict[str, Any]:
    """A device that reads 2.6 TB/s and an engine at half its roofline."""
    about = {"date": "2026-01-02", "shape": "7b", "processor": "a GPU", "versions": {"torch": "2.11"}}
    ceilings = {
        "read_bytes_per_second": 200.0 * read_a_token(SHAPES["7b"]),
        "copy_bytes_per_second": 1e12,
        "half_multiply_adds_per_second": 4e14,
    }
    return {"about": about, "ceilings": ceilings, "one row": {"tokens_per_second": 100.0}} | more


def test_sizes_are_those_of_the_published_model() -> None:
    """6,738,415,616 parameters, of which a step reads all but the embedding; half a megabyte of cache a token."""
    assert read_a_token(SHAPES["7b"]) == 2 * (6_738_415_616 - 32000 * 4096)
    assert cached_a_token(SHAPES["7b"]) == 2 * 32 * 32 * 128 * 2
    assert multiplications_a_token(SHAPES["7b"]) == 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096


def test_shares_follow_from_the_ceilings() -> None:
    """The roofline is the read bandwidth over the bytes of a step; the KV cache's count where the context is long."""
    prefill = {"prompt_tokens": 2048, "first_token_seconds": 0.1}
    long_context = {"prompt_tokens": 2500, "new_tokens": 64, "tokens_per_second": 80.0}
    text = report(results(**{"prefill": prefill, "long context": long_context}))
    assert "| roofline of a step | 200 tokens/s |" in text
    assert "| its share of the roofline | 50% | 85% |" in text
    assert "| prefill, share of the matrix rate | 33% | 50% |" in text
    # 80 tokens/s of 13.2 GB and 2,532 tokens of 0.5 MB each, of 2.6 TB/s.
    assert "| long context, share of the roofline with its KV cache | 44% | 80% |" in text


def test_what_was_not_measured_says_so() -> None:
    """A part that did not run leaves no figure behind."""
    text = report(results(service={"not run": "no structlog here"}))
    assert text.count("| not measured |") == len(LINES) - 6
    assert "| service to bare engine | not measured | 0.97 |" in text


def test_the_profile_names_what_lies_between_the_kernels() -> None:
    """Its shares add up to the step."""
    kernels = [{"name": "_product_kernel", "runs": 96.0, "seconds": 0.003}]
    text = report(results(profile={"step_seconds": 0.004, "kernels": kernels}))
    assert "| `_product_kernel` | 96 | 3000 us | 75.0% |" in text
    assert "| between the kernels | | 1000 us | 25.0% |" in text


def test_the_picture_has_a_bar_for_what_was_measured() -> None:
    """It is well-formed, and leaves out what did not run."""
    drawn = picture(results(service={"tokens_per_second": 97.0}))
    ElementTree.fromstring(drawn)  # noqa: S314 - our own
    assert "our service" in drawn
    assert "97.0" in drawn
    assert ">transformers<" not in drawn


def test_packages_come_in_the_tested_versions() -> None:
    """Each has its line among the constraints."""
    assert all("==" in line for line in pinned())
    assert len(pinned()) == len(NAMES)
