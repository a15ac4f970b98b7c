"""Metrics of measurements: medians over rounds, and medians of ratios within a round."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.measurement.disturbance import Measurement
from benchmarks.results import Results

Metric = Callable[[Measurement], float]
DECODE_PROMPT_TOKENS, PREFILL_PROMPT_TOKENS = 128, 512  # the workloads of the parts "speed" and "prefill"
PAIRED_BY = ("group", "round", "prompt_tokens", "requests", "request")  # keys on which two engines of one round agree


def decode_speed(measurement: Measurement) -> float:
    """Return the tokens per second of a single request after its first token."""
    tokens = measurement["output_tokens"] - 1
    return float(tokens / (measurement["total_seconds"] - measurement["first_seconds"]))


def aggregate_tokens_per_second(measurement: Measurement) -> float:
    """Return the new tokens per second of all requests together, prefill included."""
    return float(measurement["output_tokens"] / measurement["total_seconds"])


def first_token_seconds(measurement: Measurement) -> float:
    """Return the time to first token in seconds."""
    return float(measurement["first_seconds"])


def select(measurements: Iterable[Measurement], **values: Any) -> list[Measurement]:
    """Return the measurements that have all of these values."""
    return [one for one in measurements if all(one.get(key) == value for key, value in values.items())]


def default_to_greedy(results: Results, model: str, name: str) -> float | None:
    """Return the median over rounds of an engine's decode speed of the default request divided by the greedy one's."""
    sides = [
        one | {"contender": one["request"], "request": ""}
        for one in select(results["measurements"], part="speed", model=model, contender=name)
    ]
    return ratio(sides, "default", "greedy", decode_speed)


def select_decoding(results: Results, model: str, request: str = "default") -> list[Measurement]:
    """Return the measurements of the decode speed of a single request.

    Runs before 2026-11-26 have only greedy requests, which are returned instead.
    """
    measurements = select(results["measurements"], part="speed", model=model)
    return select(measurements, request=request) or select(measurements, request="greedy")


def models_of(results: Results, part: str) -> list[str]:
    """Return the models of a part in the order of their measurements."""
    return list(dict.fromkeys(one["model"] for one in select(results["measurements"], part=part)))


def versions_of(results: Results) -> dict[str, str]:
    """Return the versions of all libraries, sorted by name."""
    versions: dict[str, str] = {}
    for description in results["contenders"].values():
        versions |= description["versions"]
    return dict(sorted(versions.items()))


def median(measurements: Iterable[Measurement], metric: Metric) -> float | None:
    """Return the median of a metric, or None without measurements."""
    values = [metric(measurement) for measurement in measurements]
    return statistics.median(values) if values else None


def paired_median(
    measurements: Iterable[Measurement],
    one: str,
    other: str,
    combine: Callable[[Measurement, Measurement], float],
) -> float | None:
    """Combine the measurements of two engines for the same workload and round, and return the median over the rounds.

    Return None if no round has both.
    """
    sides: dict[str, dict[tuple[Any, ...], Measurement]] = {one: {}, other: {}}
    for measurement in measurements:
        if measurement["contender"] in sides:
            sides[measurement["contender"]][tuple(measurement.get(key) for key in PAIRED_BY)] = measurement
    pairs = [(sides[one][key], sides[other][key]) for key in sides[one].keys() & sides[other].keys()]
    return statistics.median(combine(*pair) for pair in pairs) if pairs else None


def ratio(measurements: Iterable[Measurement], one: str, other: str, metric: Metric) -> float | None:
    """Return the median over rounds of one engine's metric divided by the other's."""
    return paired_median(measurements, one, other, lambda a, b: metric(a) / metric(b))


def bandwidth_share(measurements: Iterable[Measurement], bytes_per_token: int) -> float | None:
    """Return the share of the memory bandwidth, measured at the same time, that the engine used for weights."""
    with_bandwidth = [one for one in measurements if "read_bytes_a_second" in one]
    return median(with_bandwidth, lambda one: decode_speed(one) * bytes_per_token / one["read_bytes_a_second"])
