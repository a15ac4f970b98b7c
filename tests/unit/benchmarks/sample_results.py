"""Invented results, small enough to check by hand."""

from typing import Any

from benchmarks.measurement.disturbance import Measurement
from benchmarks.results import Results

UNDISTURBED = {"others": 0.0, "discarded": [], "contended": False}


def generation(part: str, name: str, round_number: int, first: float, total: float, **changes: Any) -> Measurement:
    """Return a measurement of one request of 128 prompt tokens and 11 new tokens, with `changes` applied."""
    measurement = {
        "part": part,
        "model": "1.2b",
        "group": "llama.cpp F16",
        "round": round_number,
        "contender": name,
        "prompt_tokens": 128,
        "requests": 1,
        "request": "default",
        "output_tokens": 11,
        "first_seconds": first,
        "total_seconds": total,
        "agreeing": 11,
    }
    return measurement | UNDISTURBED | changes


def sample_results() -> Results:
    """Return three rounds on a machine that slows down: the service decodes 10, 5 and 2.5 tokens per second."""
    measurements: list[Measurement] = []
    for number, second in enumerate((1.0, 2.0, 4.0)):
        engine = generation("speed", "engine", number, 0.5, 0.5 + second, read_bytes_a_second=int(12.5e9 / second))
        measurements += [
            engine,
            generation("speed", "service", number, 0.52, 0.52 + second),
            generation("speed", "llama.cpp F16", number, 1.0, 1.0 + 1.6 * second),
        ]
        measurements += [
            generation("speed", name, number, 0.5, 0.5 + share * second, request="greedy", agreeing=agreeing)
            for name, share, agreeing in (("engine", 1.0, 11), ("service", 0.9, 11), ("llama.cpp F16", 1.6, 7))
        ]
    for name, first in (("engine", 1.0), ("service", 1.0), ("llama.cpp F16", 1.4)):
        measurements.append(generation("prefill", name, 0, first, first, prompt_tokens=512, output_tokens=1))
        measurements += [
            generation("lengths", name, 0, first * tokens / 512, first * tokens / 512 + 1.0, prompt_tokens=tokens)
            for tokens in (128, 512)
        ]
        measurements += [
            generation("requests", name, 0, 0.1, 1.0, requests=requests, output_tokens=10 * requests)
            for requests in (1, 2, 8)
        ]
    service_only = {"model": "1.2b", "group": "", "round": 0} | UNDISTURBED
    starts = {"first_start_seconds": 4.5, "later_start_seconds": 3.5}
    measurements.append({"part": "start", "read_seconds": 1.0} | starts | service_only)
    measurements.append({"part": "chat", "cold_seconds": 5.0, "warm_seconds": 0.5} | service_only)
    description = {"arithmetic": "float16", "versions": {"torch": "2.13.0"}}
    return {
        "date": "2026-11-22",
        "machine": {
            "processor": "A <made-up> processor & its twin",
            "cores": 2,
            "threads": 2,
            "memory_gib": 24,
            "system": "Linux",
            "python": "3.11",
        },
        "weights": {"1.2b": {"bytes": 1_100_000_000, "bytes_a_token": 1_000_000_000}},
        "contenders": dict.fromkeys(("engine", "service", "llama.cpp F16"), description),
        "not_run": {"OpenVINO bf16": "not installed: openvino"},
        "measurements": measurements,
    }
