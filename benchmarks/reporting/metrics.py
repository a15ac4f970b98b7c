"""What follows from measurements: medians over the rounds, and medians of ratios within a round."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.measurement.disturbance import Figures
from benchmarks.results import Results

Value = Callable[[Figures], float]
DECODE_PROMPT, PREFILL_PROMPT = 128, 512  # tokens; the cases of the parts "speed" and "prefill"
CASE = ("group", "round", "prompt_tokens", "requests")  # what two contenders have in common in one round


def decode_speed(figures: Figures) -> float:
    """Tokens a second after the first one, of a single request."""
    return float((figures["output_tokens"] - 1) / (figures["total_seconds"] - figures["first_seconds"]))


def together(figures: Figures) -> float:
    """New tokens a second of all requests, prefill included."""
    return float(figures["output_tokens"] / figures["total_seconds"])


def first_token(figures: Figures) -> float:
    """Seconds to the first token."""
    return float(figures["first_seconds"])


def where(measurements: Iterable[Figures], **wanted: Any) -> list[Figures]:
    """Those that have these values."""
    return [one for one in measurements if all(one.get(key) == value for key, value in wanted.items())]


def decoding(results: Results, model: str) -> list[Figures]:
    """The measurements that tell how fast a single request decodes."""
    return where(results["measurements"], part="speed", model=model)


def median(measurements: Iterable[Figures], value: Value) -> float | None:
    """None of none."""
    values = [value(figures) for figures in measurements]
    return statistics.median(values) if values else None


def paired(
    measurements: Iterable[Figures], one: str, other: str, combine: Callable[[Figures, Figures], float]
) -> float | None:
    """The median over rounds of a number made of two contenders' measurements of one case; None where none has both."""
    sides: dict[str, dict[tuple[Any, ...], Figures]] = {one: {}, other: {}}
    for figures in measurements:
        if figures["contender"] in sides:
            sides[figures["contender"]][tuple(figures[key] for key in CASE)] = figures
    pairs = [(sides[one][case], sides[other][case]) for case in sides[one].keys() & sides[other].keys()]
    return statistics.median(combine(*pair) for pair in pairs) if pairs else None


def ratio(measurements: Iterable[Figures], one: str, other: str, value: Value) -> float | None:
    """The median over rounds of one contender's value over the other's."""
    return paired(measurements, one, other, lambda a, b: value(a) / value(b))


def bandwidth_share(measurements: Iterable[Figures], bytes_a_token: int) -> float | None:
    """How much of the memory's speed just then the engine's weights took while it decoded."""
    read = [figures for figures in measurements if "read_bytes_a_second" in figures]
    return median(read, lambda figures: decode_speed(figures) * bytes_a_token / figures["read_bytes_a_second"])
