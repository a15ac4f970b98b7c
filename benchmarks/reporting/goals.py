"""What we set out to reach on a CPU, and what was reached."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

from benchmarks.reporting.metrics import (
    bandwidth_share,
    decode_speed,
    decoding,
    first_token,
    median,
    paired,
    ratio,
    together,
    where,
)
from benchmarks.results import Results

LARGE, SMALL = "1.2b", "134m"
# Service's decode speed over each peer's, at least: by model, then by peer.
DECODE = {
    LARGE: {"transformers.generate": 2.0, "llama.cpp F16": 1.5, "": 1.2},
    SMALL: {"transformers.generate": 2.5, "llama.cpp F16": 1.5, "": 1.25},
}
START_FACTOR, START_SECONDS = 1.3, 3.0


@dataclass(frozen=True)
class Goal:
    """A number and what it should be."""

    what: str
    wanted: str
    found: str
    met: bool


def goals(results: Results) -> Iterator[Goal]:
    """All that the measurements tell of."""
    yield from _decoding(results)
    yield from _engine_and_service(results)
    yield from _prefill(results)
    yield from _sharing(results)
    yield from _alone(results)


def best_peer(results: Results, model: str) -> str:
    """The one that decodes fastest; "" where none was measured."""
    speed = decoding(results, model)
    peers = {one["contender"] for one in speed} - {"engine", "service"}
    return max(peers, key=lambda peer: median(where(speed, contender=peer), decode_speed) or 0.0, default="")


def _decoding(results: Results) -> Iterator[Goal]:
    for model, wanted in DECODE.items():
        speed = decoding(results, model)
        for peer, least in wanted.items():
            name = peer or best_peer(results, model)
            found = ratio(speed, "service", name, decode_speed)
            if found is not None:
                what = f"service's decode speed to {'the fastest peer, ' if not peer else ''}{name}, {model.upper()}"
                yield _at_least(what, found, least, "{:.2f} x")


def _engine_and_service(results: Results) -> Iterator[Goal]:
    for model in (LARGE, SMALL):
        speed = decoding(results, model)
        found = ratio(speed, "service", "engine", decode_speed)
        if found is not None:
            yield _at_least(f"service's decode speed to the engine's, {model.upper()}", found, 0.95, "{:.2f} x")
    speed = decoding(results, LARGE)
    late = paired(speed, "service", "engine", lambda a, b: first_token(a) - first_token(b))
    if late is not None:
        yield _at_most("service's time to the first token beyond the bare prefill", late * 1000, 60, "{:.0f} ms")
    engine = where(speed, contender="engine")
    share = bandwidth_share(engine, results["weights"][LARGE]["bytes_a_token"]) if engine else None
    if share is not None:
        yield _at_least(f"engine's share of the memory's read bandwidth, {LARGE.upper()}", share, 0.85, "{:.0%}")


def _prefill(results: Results) -> Iterator[Goal]:
    prefills = where(results["measurements"], part="prefill", model=LARGE)
    found = ratio(prefills, "llama.cpp F16", "service", first_token)
    if found is not None:
        yield _at_least("service's prefill of 512 tokens to llama.cpp F16's", found, 1.5, "{:.2f} x")


def _sharing(results: Results) -> Iterator[Goal]:
    for name in ("engine", "service"):
        requests = where(results["measurements"], part="requests", contender=name)
        # Both sides are of one round: the number of requests is not a part of the pair here.
        alone = [one | {"contender": "alone", "requests": 0} for one in where(requests, requests=1)]
        eight = [one | {"requests": 0} for one in where(requests, requests=8)]
        found = ratio([*alone, *eight], name, "alone", together)
        if found is not None:
            yield _at_least(f"{name}: 8 requests at once to one after another", found, 4.0, "{:.2f} x")


def _alone(results: Results) -> Iterator[Goal]:
    starts = where(results["measurements"], part="start")
    if starts:
        limit = median(starts, lambda one: START_FACTOR * one["read_seconds"] + START_SECONDS) or 0.0
        for which in ("first", "later"):
            found = median(starts, itemgetter(f"{which}_start_seconds")) or 0.0
            yield _at_most(f"{which} start-up, from exec to SERVING", found, limit, "{:.1f} s")
    share = median(where(results["measurements"], part="chat"), lambda one: one["warm_seconds"] / one["cold_seconds"])
    if share is not None:
        yield _at_most(
            "second turn of a chat of 1,500 tokens: time to first token to the cold one", share, 0.15, "{:.1%}"
        )


def _at_least(what: str, found: float, wanted: float, form: str) -> Goal:
    return Goal(what, f"at least {form.format(wanted)}", form.format(found), found >= wanted)


def _at_most(what: str, found: float, wanted: float, form: str) -> Goal:
    return Goal(what, f"at most {form.format(wanted)}", form.format(found), found <= wanted)
