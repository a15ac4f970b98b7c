"""Writes what was measured as tables (Markdown) and as a picture (SVG) beside the results, without measuring anything.

python -m benchmarks.report benchmarks/results/FILE.json
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measurement.disturbance import MAX_FOREIGN_CPU, Figures
from benchmarks.reporting.charts import picture
from benchmarks.reporting.goals import goals
from benchmarks.reporting.metrics import (
    DECODE_PROMPT,
    PREFILL_PROMPT,
    bandwidth_share,
    decode_speed,
    decoding,
    first_token,
    median,
    ratio,
    together,
    where,
)
from benchmarks.results import Results

ORDER = ("service", "engine")  # ours first
NAMES = {"service": "**our service**, over gRPC", "engine": "our bare engine"}


def write(path: Path) -> None:
    """Write FILE.md and FILE.svg, and print the former."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    text = "\n".join(lines(results)) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    path.with_suffix(".svg").write_text(picture(results), encoding="utf-8")
    print(f"\n{text}")


def lines(results: Results) -> Iterator[str]:
    """The report, line by line."""
    yield from _head(results)
    for model in _models(results, "speed"):
        yield from _speed(results, model)
    for model in _models(results, "prefill"):
        yield from _prefill(results, model)
    yield from _goals(results)
    yield from _by(results, "lengths", "prompt_tokens", "Decode tokens/s after a prompt of", decode_speed, "{:.1f}")
    yield from _by(
        results, "lengths", "prompt_tokens", "Seconds to the first token of a prompt of", first_token, "{:.2f}"
    )
    yield from _by(results, "requests", "requests", "Tokens/s of all requests at once, of", together, "{:.1f}")
    yield from _alone(results)
    yield from _foot(results)


def _head(results: Results) -> Iterator[str]:
    machine = results["machine"]
    versions: dict[str, str] = {}
    for about in results["contenders"].values():
        versions |= about["versions"]
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    yield f"# {results['date']}: {machine['processor']}, {machine['threads']} threads"
    yield ""
    yield (
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}; "
        f"{named}. Random float16 weights of Llama's shape, greedy; no GPU used. Medians over the rounds; ratios are "
        "medians of the rounds' own ratios."
    )


def _speed(results: Results, model: str) -> Iterator[str]:
    speed = decoding(results, model)
    tokens = max(figures["output_tokens"] for figures in speed)
    weights = results["weights"][model]
    yield from ("", f"## {model.upper()}: decoding {tokens} tokens after a prompt of {DECODE_PROMPT}", "")
    yield "| | weights and arithmetic | tokens/s | service to it | first token | replies equal to the engine's |"
    yield "|---|---|---|---|---|---|"
    for name in _contenders(speed):
        own = where(speed, contender=name)
        equal = sum(figures["agreeing"] >= figures["output_tokens"] for figures in own)
        row = (
            NAMES.get(name, name),
            results["contenders"][name]["arithmetic"],
            _number(median(own, decode_speed), "{:.1f}"),
            _number(ratio(speed, "service", name, decode_speed), "{:.2f} x"),
            _milliseconds(own),
            f"{equal} of {len(own)}",
        )
        yield f"| {' | '.join(row)} |"
    share = bandwidth_share(where(speed, contender="engine"), weights["bytes_a_token"])
    read = median(where(speed, contender="engine"), lambda one: one.get("read_bytes_a_second", 0.0) / 1e9)
    if share is not None:
        yield ""
        yield (
            f"The engine reads {weights['bytes_a_token'] / 1e9:.2f} GB of weights a token, {share:.0%} of what the "
            f"same threads read in the same moments ({read:.1f} GB/s)."
        )


def _prefill(results: Results, model: str) -> Iterator[str]:
    prefills = where(results["measurements"], part="prefill", model=model)
    yield from ("", f"## {model.upper()}: prefill of {PREFILL_PROMPT} tokens", "")
    yield from ("| | first token | service to it |", "|---|---|---|")
    for name in _contenders(prefills):
        times = _number(ratio(prefills, name, "service", first_token), "{:.2f} x")
        yield f"| {NAMES.get(name, name)} | {_milliseconds(where(prefills, contender=name))} | {times} |"


def _goals(results: Results) -> Iterator[str]:
    yield from ("", "## Goals", "", "| | goal | reached | |", "|---|---|---|---|")
    for goal in goals(results):
        yield f"| {goal.what} | {goal.wanted} | {goal.found} | {'met' if goal.met else '**missed**'} |"


def _by(
    results: Results, part: str, key: str, title: str, value: Callable[[Figures], float], form: str
) -> Iterator[str]:
    for model in _models(results, part):
        measurements = where(results["measurements"], part=part, model=model)
        columns = sorted({figures[key] for figures in measurements})
        yield from ("", f"## {model.upper()}: {title[0].lower()}{title[1:]} …", "")
        yield f"| | {' | '.join(f'{column:,}' for column in columns)} |"
        yield f"|---|{'---|' * len(columns)}"
        for name in _contenders(measurements):
            cells = (median(where(measurements, contender=name, **{key: column}), value) for column in columns)
            yield f"| {NAMES.get(name, name)} | {' | '.join(_number(cell, form) for cell in cells)} |"


def _alone(results: Results) -> Iterator[str]:
    starts = where(results["measurements"], part="start")
    chats = where(results["measurements"], part="chat")
    if not starts and not chats:
        return
    yield from ("", "## The service by itself", "")
    if starts:
        names = ("first_start_seconds", "later_start_seconds", "read_seconds")
        first, later, read = (_seconds(starts, name) for name in names)
        yield (
            f"- {starts[0]['model'].upper()}: from exec to SERVING {first} for the first time and {later} later, when "
            f"transformers need not be asked what the configuration says; reading the files of the weights once takes "
            f"{read}, from the system's cache like the start itself."
        )
    if chats:
        warm, cold = _seconds(chats, "warm_seconds"), _seconds(chats, "cold_seconds")
        yield (
            f"- {chats[0]['model'].upper()}: the second turn of a chat of 1,500 tokens has its first token after "
            f"{warm}, and after {cold} where nothing is known of it."
        )


def _foot(results: Results) -> Iterator[str]:
    measurements = results["measurements"]
    discarded = sum(len(figures["discarded"]) for figures in measurements)
    contended = sum(figures["contended"] for figures in measurements)
    unwatched = sum(figures["others"] is None for figures in measurements)
    yield from ("", "## How quiet it was", "")
    yield (
        f"{len(measurements)} measurements are kept. {discarded} more were discarded and repeated, because other "
        f"processes took over {MAX_FOREIGN_CPU:.0%} of the processors' time; {contended} stayed so at the last attempt "
        "and are in the figures."
    )
    if unwatched:
        yield f"For {unwatched} of them the system did not tell what others took."
    if results["not_run"]:
        yield from ("", "## Not run", "")
        yield from (f"- {name}: {why}" for name, why in results["not_run"].items())


def _models(results: Results, part: str) -> list[str]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(figures["model"] for figures in where(results["measurements"], part=part)))


def _contenders(measurements: list[Figures]) -> list[str]:
    """Ours first, then by decode speed or whatever they were measured in: as they came."""
    found = dict.fromkeys(figures["contender"] for figures in measurements)
    return [*(name for name in ORDER if name in found), *(name for name in found if name not in ORDER)]


def _milliseconds(measurements: list[Figures]) -> str:
    return _number(median(measurements, lambda one: first_token(one) * 1000), "{:,.0f} ms")


def _seconds(measurements: list[Figures], key: str) -> str:
    return _number(median(measurements, lambda one: float(one[key])), "{:.2f} s")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    """Report on the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON file of a run")
    write(parser.parse_args().results)


if __name__ == "__main__":
    main()
