"""The charts of a results file."""

from benchmarks.measurement.disturbance import Measurement
from benchmarks.reporting.metrics import (
    DECODE_PROMPT_TOKENS,
    Metric,
    aggregate_tokens_per_second,
    decode_speed,
    first_token_seconds,
    median,
    models_of,
    select,
    select_decoding,
    versions_of,
)
from benchmarks.reporting.plots import Panel, Series, Style, bar_panel, line_panel, notes_panel, render_svg
from benchmarks.results import Results

STYLES = {
    "service": Style("#d9480f", bold=True),
    "engine": Style("#e8842c", dashed=True),
    "transformers.generate": Style("#7d8590"),
    "llama.cpp F16": Style("#2f81f7"),
    "llama.cpp BF16": Style("#2f81f7", dashed=True),
    "OpenVINO f16": Style("#8250df"),
    "OpenVINO bf16": Style("#a371f7", dashed=True),
    "OpenVINO f32": Style("#a371f7"),
    "OpenVINO GenAI bf16": Style("#bf3989"),
    "vLLM bfloat16": Style("#c69026"),
    "ONNX Runtime GenAI float32": Style("#57ab5a"),
    "CTranslate2 bfloat16": Style("#1b9e77", dashed=True),
    "CTranslate2 float32": Style("#1b9e77"),
}
DISPLAY_NAMES = {"service": "our service", "engine": "our engine only", "transformers.generate": "transformers"}


def draw_svg(results: Results) -> str:
    """Return an SVG figure with a chart for each measured part."""
    panels = [_decoding(results, model) for model in models_of(results, "speed")]
    for model in models_of(results, "lengths"):
        panels += _by_prompt_length(results, model)
    panels += [_by_requests(results, model) for model in models_of(results, "requests")]
    panels.append(_notes(results))
    return render_svg(f"Benchmarks of {results['date']}, {results['machine']['processor']}", panels)


def _decoding(results: Results, model: str) -> Panel:
    measurements = select_decoding(results, model)
    names = dict.fromkeys(one["contender"] for one in measurements)
    medians = {name: median(select(measurements, contender=name), decode_speed) or 0.0 for name in names}
    bars = [
        (DISPLAY_NAMES.get(name, name), value, _style(name))
        for name, value in sorted(medians.items(), key=lambda item: -item[1])
    ]
    label = f"tokens/s of one request after a prompt of {DECODE_PROMPT_TOKENS} tokens"
    return bar_panel(f"Decoding, {model.upper()}", label, bars)


def _by_prompt_length(results: Results, model: str) -> list[Panel]:
    measurements = select(results["measurements"], part="lengths", model=model)
    speeds = _series(measurements, "prompt_tokens", decode_speed)
    waits = _series(measurements, "prompt_tokens", first_token_seconds)
    title = f"Time to first token, {model.upper()}"
    return [
        line_panel(f"Decoding by prompt length, {model.upper()}", "prompt tokens", "tokens/s", speeds),
        line_panel(title, "prompt tokens", "seconds", waits, logarithmic=True),
    ]


def _by_requests(results: Results, model: str) -> Panel:
    measurements = select(results["measurements"], part="requests", model=model)
    series = _series(measurements, "requests", aggregate_tokens_per_second)
    label = "concurrent requests of 128 + 128 tokens"
    return line_panel(f"Concurrent requests, {model.upper()}", label, "tokens/s in total, prefill included", series)


def _notes(results: Results) -> Panel:
    machine = results["machine"]
    lines = [
        machine["processor"],
        f"{machine['threads']} threads on {machine['cores']} cores, {machine['memory_gib']} GiB, no GPU",
        *(f"{name} {version}" for name, version in versions_of(results).items()),
        "Random weights in Llama's shape, rounded to bfloat16, stored in float16.",
        "Sampled at temperature 0.6 and top_p 0.9.",
        "Medians of interleaved rounds; the service is called over gRPC.",
    ]
    return notes_panel(f"Measured on {results['date']}", lines)


def _series(measurements: list[Measurement], key: str, metric: Metric) -> list[Series]:
    series = []
    for name in dict.fromkeys(one["contender"] for one in measurements):
        own = select(measurements, contender=name)
        columns = sorted({one[key] for one in own})
        points = [(column, median(select(own, **{key: column}), metric) or 0.0) for column in columns]
        series.append(Series(DISPLAY_NAMES.get(name, name), points, _style(name)))
    return series


def _style(name: str) -> Style:
    return STYLES.get(name, Style("#7d8590", dashed=True))
