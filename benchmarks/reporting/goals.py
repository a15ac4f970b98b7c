"""The speed goals on a CPU, compared with the measurements."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

from benchmarks.measurement.disturbance import Measurement
from benchmarks.reporting.metrics import (
    aggregate_tokens_per_second,
    bandwidth_share,
    decode_speed,
    default_to_greedy,
    first_token_seconds,
    median,
    paired_median,
    ratio,
    select,
    select_decoding,
)
from benchmarks.results import Results

LARGE, SMALL, FLAT = "1.2b", "134m", "134m-flat"
FASTEST_PEER = ""
# Minimum decode speed of the service relative to each peer, by model and peer: on Intel's processors and on others.
MIN_DECODE_RATIOS = {
    LARGE: {"transformers.generate": (1.8, 1.8), "llama.cpp F16": (1.45, 1.25), FASTEST_PEER: (1.4, 1.2)},
    SMALL: {FASTEST_PEER: (1.6, 1.15)},
}
MIN_AFTER_LONG_PROMPT = 1.6  # the same to the fastest peer after LONG_PROMPT_TOKENS
LONG_PROMPT_TOKENS = 2048
MIN_READ_RATIO = 1.2  # of the engine to the rate at which weights of 16 bits can be read
MIN_ENGINE_RATIOS = {LARGE: 0.99, SMALL: 0.97}  # of the service to the engine
MIN_DEFAULT_RATIOS = {LARGE: 0.97, SMALL: 0.97, FLAT: 0.9}  # of the default request to the greedy one
# Maximum start-up time: this factor times one read of the weights, plus these seconds.
START_FACTOR, START_SECONDS = 1.3, 3.0


@dataclass(frozen=True)
class Goal:
    """A measured quantity with its target and its value."""

    description: str
    target: str
    reached: str
    met: bool


def evaluate_goals(results: Results) -> Iterator[Goal]:
    """Yield each goal for which the results have measurements."""
    yield from _decoding(results)
    yield from _service_overhead(results)
    yield from _prefill(results)
    yield from _concurrency(results)
    yield from _service_only(results)


def fastest_peer(results: Results, model: str) -> str:
    """Return the name of the peer that decodes fastest, or "" without peers."""
    return _fastest(select_decoding(results, model))


def _fastest(measurements: list[Measurement]) -> str:
    peers = {one["contender"] for one in measurements} - {"engine", "service"}
    return max(peers, key=lambda peer: median(select(measurements, contender=peer), decode_speed) or 0.0, default="")


def _decoding(results: Results) -> Iterator[Goal]:
    for model, targets in MIN_DECODE_RATIOS.items():
        measurements = select_decoding(results, model)
        for peer, (intel, other) in targets.items():
            target = intel if "Intel" in results["machine"]["processor"] else other
            name = peer or fastest_peer(results, model)
            found = ratio(measurements, "service", name, decode_speed)
            if found is not None:
                label = f"the fastest peer, {name}" if peer == FASTEST_PEER else name
                yield _at_least(f"decode speed of the service / {label}, {model.upper()}", found, target, "{:.2f} x")
    long = select(results["measurements"], part="lengths", model=LARGE, prompt_tokens=LONG_PROMPT_TOKENS)
    found = ratio(long, "service", name := _fastest(long), decode_speed)
    if found is not None:
        label = f"the same after {LONG_PROMPT_TOKENS:,} tokens, the fastest peer {name}"
        yield _at_least(label, found, MIN_AFTER_LONG_PROMPT, "{:.2f} x")


def _service_overhead(results: Results) -> Iterator[Goal]:
    for model, target in MIN_ENGINE_RATIOS.items():
        found = ratio(select_decoding(results, model), "service", "engine", decode_speed)
        if found is not None:
            yield _at_least(f"decode speed of the service / engine only, {model.upper()}", found, target, "{:.2f} x")
    for model, target in MIN_DEFAULT_RATIOS.items():
        found = default_to_greedy(results, model, "service")
        if found is not None:
            label = f"decode speed of the service, default request / greedy, {model.upper()}"
            yield _at_least(label, found, target, "{:.2f} x")
    large = select_decoding(results, LARGE)
    delay = paired_median(large, "service", "engine", lambda a, b: first_token_seconds(a) - first_token_seconds(b))
    if delay is not None:
        yield _at_most("time to first token of the service minus engine only", delay * 1000, 60, "{:.0f} ms")
    engine = select(large, contender="engine")
    share = bandwidth_share(engine, results["weights"][LARGE]["bytes_a_token"]) if engine else None
    if share is not None:
        label = f"decode speed of the engine / reading its weights at 16 bits, {LARGE.upper()}"
        yield _at_least(label, share, MIN_READ_RATIO, "{:.2f} x")


def _prefill(results: Results) -> Iterator[Goal]:
    measurements = select(results["measurements"], part="prefill", model=LARGE)
    found = ratio(measurements, "llama.cpp F16", "service", first_token_seconds)
    if found is not None:
        yield _at_least("prefill speed of the service / llama.cpp F16, 512 tokens", found, 1.5, "{:.2f} x")


def _concurrency(results: Results) -> Iterator[Goal]:
    for name, label in (("engine", "engine only"), ("service", "service")):
        measurements = select(results["measurements"], part="requests", contender=name)
        # Both sides of a pair are from one round; a constant number of requests makes them a pair.
        single = [one | {"contender": "single", "requests": 0} for one in select(measurements, requests=1)]
        eight = [one | {"requests": 0} for one in select(measurements, requests=8)]
        found = ratio([*single, *eight], name, "single", aggregate_tokens_per_second)
        if found is not None:
            yield _at_least(f"throughput of 8 requests / 1 request, {label}", found, 4.0, "{:.2f} x")


def _service_only(results: Results) -> Iterator[Goal]:
    starts = select(results["measurements"], part="start")
    if starts:
        limit = median(starts, lambda one: START_FACTOR * one["read_seconds"] + START_SECONDS) or 0.0
        for which in ("first", "later"):
            found = median(starts, itemgetter(f"{which}_start_seconds")) or 0.0
            yield _at_most(f"{which} start, from exec to SERVING", found, limit, "{:.1f} s")
    chats = select(results["measurements"], part="chat")
    share = median(chats, lambda one: one["warm_seconds"] / one["cold_seconds"])
    if share is not None:
        description = "time to first token of a second turn, with / without the first turn (1,500 tokens)"
        yield _at_most(description, share, 0.15, "{:.1%}")


def _at_least(description: str, reached: float, target: float, form: str) -> Goal:
    return Goal(description, f"at least {form.format(target)}", form.format(reached), reached >= target)


def _at_most(description: str, reached: float, target: float, form: str) -> Goal:
    return Goal(description, f"at most {form.format(target)}", form.format(reached), reached <= target)
