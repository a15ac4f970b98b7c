"""The report of a results file as Markdown."""

from collections.abc import Iterator

from benchmarks.measurement.disturbance import MAX_FOREIGN_CPU, Measurement
from benchmarks.reporting.goals import evaluate_goals
from benchmarks.reporting.metrics import (
    DECODE_PROMPT_TOKENS,
    PREFILL_PROMPT_TOKENS,
    Metric,
    aggregate_tokens_per_second,
    bandwidth_share,
    decode_speed,
    default_to_greedy,
    first_token_seconds,
    median,
    models_of,
    ratio,
    select,
    select_decoding,
    versions_of,
)
from benchmarks.results import Results

FIRST_ROWS = ("service", "engine")
DISPLAY_NAMES = {"service": "**our service**, over gRPC", "engine": "our engine only"}


def report_lines(results: Results) -> Iterator[str]:
    """Yield the report line by line."""
    yield from _heading(results)
    for model in models_of(results, "speed"):
        yield from _decoding_table(results, model)
    for model in models_of(results, "prefill"):
        yield from _prefill_table(results, model)
    yield from _goals_table(results)
    prompts = ("lengths", "prompt_tokens")
    yield from _table_by(results, *prompts, "decode tokens/s by prompt length", decode_speed, "{:.1f}")
    yield from _table_by(results, *prompts, "seconds to first token by prompt length", first_token_seconds, "{:.2f}")
    title = "tokens/s of all requests together, by number of concurrent requests"
    yield from _table_by(results, "requests", "requests", title, aggregate_tokens_per_second, "{:.1f}")
    yield from _service_only(results)
    yield from _disturbance(results)
    yield from _not_run(results)


def _heading(results: Results) -> Iterator[str]:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(results).items())
    yield f"# {results['date']}: {machine['processor']}, {machine['threads']} threads"
    yield ""
    yield (
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}; "
        f"{versions}. Random float16 weights in Llama's shape, no GPU. A default request samples at temperature 0.6 "
        "and top_p 0.9. Values are medians over the rounds; ratios are medians of the ratios within each round."
    )


def _decoding_table(results: Results, model: str) -> Iterator[str]:
    measurements = select_decoding(results, model)
    tokens = max(one["output_tokens"] for one in measurements)
    yield from ("", f"## {model.upper()}: decoding {tokens} tokens after a prompt of {DECODE_PROMPT_TOKENS}", "")
    yield "| | weights and arithmetic | tokens/s | service / this | first token | greedy tokens/s | default / greedy |"
    yield "|---|---|---|---|---|---|---|"
    greedy = select_decoding(results, model, "greedy")
    for name in _row_order(measurements):
        own = select(measurements, contender=name)
        row = (
            DISPLAY_NAMES.get(name, name),
            results["contenders"][name]["arithmetic"],
            _format(median(own, decode_speed), "{:.1f}"),
            _format(ratio(measurements, "service", name, decode_speed), "{:.2f} x"),
            _first_token_milliseconds(own),
            _format(median(select(greedy, contender=name), decode_speed), "{:.1f}"),
            _format(default_to_greedy(results, model, name), "{:.2f} x"),
        )
        yield f"| {' | '.join(row)} |"
    yield from _bandwidth(select(measurements, contender="engine"), results["weights"][model]["bytes_a_token"])
    yield from _agreement(greedy)


def _bandwidth(measurements: list[Measurement], bytes_per_token: int) -> Iterator[str]:
    share = bandwidth_share(measurements, bytes_per_token)
    bandwidth = median(measurements, lambda one: one.get("read_bytes_a_second", 0.0) / 1e9)
    if share is not None:
        yield ""
        yield (
            f"A token needs {bytes_per_token / 1e9:.2f} GB of 16-bit weights. The engine decodes {share:.2f} times as "
            f"fast as the same threads could read these just before and after ({bandwidth:.1f} GB/s)."
        )


def _agreement(greedy: list[Measurement]) -> Iterator[str]:
    """Yield how many greedy replies of each peer equal our engine's."""
    peers = [name for name in _row_order(greedy) if name not in FIRST_ROWS]
    if peers:
        yield ""
        counts = []
        for name in peers:
            own = select(greedy, contender=name)
            counts.append(f"{name} {sum(one['agreeing'] >= one['output_tokens'] for one in own)} of {len(own)}")
        yield f"Greedy replies that equal our engine's: {', '.join(counts)}. The service's equal it always."


def _prefill_table(results: Results, model: str) -> Iterator[str]:
    measurements = select(results["measurements"], part="prefill", model=model)
    yield from ("", f"## {model.upper()}: prefill of {PREFILL_PROMPT_TOKENS} tokens", "")
    yield from ("| | first token | service's speed / this |", "|---|---|---|")
    for name in _row_order(measurements):
        speed = _format(ratio(measurements, name, "service", first_token_seconds), "{:.2f} x")
        own = select(measurements, contender=name)
        yield f"| {DISPLAY_NAMES.get(name, name)} | {_first_token_milliseconds(own)} | {speed} |"


def _goals_table(results: Results) -> Iterator[str]:
    yield from ("", "## Goals", "", "| | goal | reached | |", "|---|---|---|---|")
    for goal in evaluate_goals(results):
        yield f"| {goal.description} | {goal.target} | {goal.reached} | {'met' if goal.met else '**missed**'} |"


def _table_by(results: Results, part: str, key: str, title: str, metric: Metric, form: str) -> Iterator[str]:
    """Yield one table per model, with a row per engine and a column per value of `key`."""
    for model in models_of(results, part):
        measurements = select(results["measurements"], part=part, model=model)
        columns = sorted({one[key] for one in measurements})
        yield from ("", f"## {model.upper()}: {title}", "")
        yield f"| | {' | '.join(f'{column:,}' for column in columns)} |"
        yield f"|---|{'---|' * len(columns)}"
        for name in _row_order(measurements):
            cells = (median(select(measurements, contender=name, **{key: column}), metric) for column in columns)
            yield f"| {DISPLAY_NAMES.get(name, name)} | {' | '.join(_format(cell, form) for cell in cells)} |"


def _service_only(results: Results) -> Iterator[str]:
    starts = select(results["measurements"], part="start")
    chats = select(results["measurements"], part="chat")
    if not starts and not chats:
        return
    yield from ("", "## Service only", "")
    if starts:
        keys = ("first_start_seconds", "later_start_seconds", "read_seconds")
        first, later, read = (_seconds(starts, key) for key in keys)
        yield (
            f"- {starts[0]['model'].upper()}: from exec to SERVING the first start takes {first}. A later start takes "
            f"{later}, because it reads the cached configuration and does not import transformers. One read of the "
            f"weight files takes {read}. All of them read from the page cache."
        )
    if chats:
        warm, cold = _seconds(chats, "warm_seconds"), _seconds(chats, "cold_seconds")
        yield (
            f"- {chats[0]['model'].upper()}: the time to first token of a second turn, in a chat of 1,500 tokens, is "
            f"{warm} after the first turn and {cold} without it."
        )


def _disturbance(results: Results) -> Iterator[str]:
    measurements = results["measurements"]
    discarded = sum(len(one["discarded"]) for one in measurements)
    contended = sum(one["contended"] for one in measurements)
    unknown = sum(one["others"] is None for one in measurements)
    yield from ("", "## Disturbance", "")
    yield (
        f"{len(measurements)} measurements are kept. {discarded} more were discarded and repeated, because foreign "
        f"processes took over {MAX_FOREIGN_CPU:.0%} of the CPU time. {contended} kept measurements were disturbed at "
        "the last attempt."
    )
    if unknown:
        yield f"For {unknown} measurements the system does not report the foreign CPU share."


def _not_run(results: Results) -> Iterator[str]:
    if results["not_run"]:
        yield from ("", "## Not run", "")
        yield from (f"- {name}: {reason}" for name, reason in results["not_run"].items())


def _row_order(measurements: list[Measurement]) -> list[str]:
    """Return the names with ours first and the peers in the order of their measurements."""
    names = dict.fromkeys(one["contender"] for one in measurements)
    return [*(name for name in FIRST_ROWS if name in names), *(name for name in names if name not in FIRST_ROWS)]


def _first_token_milliseconds(measurements: list[Measurement]) -> str:
    return _format(median(measurements, lambda one: first_token_seconds(one) * 1000), "{:,.0f} ms")


def _seconds(measurements: list[Measurement], key: str) -> str:
    return _format(median(measurements, lambda one: float(one[key])), "{:.2f} s")


def _format(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
