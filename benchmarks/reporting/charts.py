"""The picture of a run: what to draw of its measurements; svg.py draws it."""

from collections.abc import Callable

from benchmarks.measurement.disturbance import Figures
from benchmarks.reporting.metrics import DECODE_PROMPT, decode_speed, decoding, first_token, median, together, where
from benchmarks.results import Results
from benchmarks.svg import Look, Series, bar_chart, document, line_chart, note_chart

LOOKS = {
    "service": Look("#d9480f", bold=True),
    "engine": Look("#e8842c", dashed=True),
    "transformers.generate": Look("#7d8590"),
    "llama.cpp F16": Look("#2f81f7"),
    "llama.cpp BF16": Look("#2f81f7", dashed=True),
    "OpenVINO f16": Look("#8250df"),
    "OpenVINO bf16": Look("#a371f7", dashed=True),
    "OpenVINO f32": Look("#a371f7"),
    "CTranslate2 bfloat16": Look("#1b9e77", dashed=True),
    "CTranslate2 float32": Look("#1b9e77"),
}
NAMES = {"service": "our service", "engine": "our engine", "transformers.generate": "transformers"}


def picture(results: Results) -> str:
    """An SVG with a chart for each thing that was measured."""
    charts = [_decoding(results, model) for model in _models(results, "speed")]
    for model in _models(results, "lengths"):
        lengths = where(results["measurements"], part="lengths", model=model)
        speed = _series(lengths, "prompt_tokens", decode_speed)
        charts.append(line_chart(f"Decode against context, {model.upper()}", "tokens/s after so many tokens", speed))
        waiting = _series(lengths, "prompt_tokens", first_token)
        title = f"Time to first token, {model.upper()}"
        charts.append(line_chart(title, "seconds, for a prompt of so many tokens", waiting, logarithmic=True))
    for model in _models(results, "requests"):
        shared = _series(where(results["measurements"], part="requests", model=model), "requests", together)
        title = f"Requests at once, {model.upper()}"
        charts.append(line_chart(title, "tokens/s of all together, prefill included; 128 + 128 tokens each", shared))
    charts.append(_notes(results))
    return document(f"Benchmarks of {results['date']}, {results['machine']['processor']}", charts)


def _decoding(results: Results, model: str) -> str:
    speed = decoding(results, model)
    names = dict.fromkeys(figures["contender"] for figures in speed)
    medians = {name: median(where(speed, contender=name), decode_speed) or 0.0 for name in names}
    bars = [
        (NAMES.get(name, name), value, _look(name))
        for name, value in sorted(medians.items(), key=lambda item: -item[1])
    ]
    return bar_chart(f"Decoding, {model.upper()}", f"tokens/s of one request, after a prompt of {DECODE_PROMPT}", bars)


def _notes(results: Results) -> str:
    """What the figures hold for."""
    machine = results["machine"]
    versions: dict[str, str] = {}
    for about in results["contenders"].values():
        versions |= about["versions"]
    lines = [
        machine["processor"],
        f"{machine['threads']} threads on {machine['cores']} cores, {machine['memory_gib']} GiB, no GPU",
        *(f"{name} {version}" for name, version in sorted(versions.items())),
        "Random float16 weights of Llama's shape, greedy, no quantization.",
        "Medians of interleaved rounds; the service is called over gRPC.",
    ]
    return note_chart(f"Measured on {results['date']}", lines)


def _series(measurements: list[Figures], key: str, value: Callable[[Figures], float]) -> list[Series]:
    series = []
    for name in dict.fromkeys(figures["contender"] for figures in measurements):
        own = where(measurements, contender=name)
        columns = sorted({figures[key] for figures in own})
        points = [(column, median(where(own, **{key: column}), value) or 0.0) for column in columns]
        series.append(Series(NAMES.get(name, name), points, _look(name)))
    return series


def _look(name: str) -> Look:
    return LOOKS.get(name, Look("#7d8590", dashed=True))


def _models(results: Results, part: str) -> list[str]:
    return list(dict.fromkeys(figures["model"] for figures in where(results["measurements"], part=part)))
