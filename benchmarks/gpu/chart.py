"""The chart of a GPU run, for the README."""

from collections.abc import Callable

from benchmarks.gpu.report import COMPILED, ONE_ROW, TRANSFORMERS, TRANSFORMERS_STATIC, DerivedMetrics, Results
from benchmarks.reporting.plots import Style, bar_panel, notes_panel, render_svg

OUR_COLOR, OTHER_COLOR = "#d9480f", "#7d8590"


def draw_svg(results: Results) -> str:
    """Return an SVG with the decode speeds, the roofline and notes; parts that were not measured are omitted."""
    metrics = DerivedMetrics(results)
    candidates: list[tuple[str, Callable[[], float], Style]] = [
        ("roofline", lambda: metrics.roofline, Style(OTHER_COLOR, dashed=True)),
        ("our engine only", lambda: metrics.speed(ONE_ROW), Style("#e8842c")),
        ("our service", lambda: metrics.speed("service"), Style(OUR_COLOR, bold=True)),
        ("compiled step", lambda: metrics.speed(COMPILED), Style(OTHER_COLOR)),
        ("transformers, static", lambda: metrics.speed(TRANSFORMERS_STATIC), Style(OTHER_COLOR)),
        ("transformers", lambda: metrics.speed(TRANSFORMERS), Style(OTHER_COLOR)),
    ]
    bars = []
    for name, value, style in candidates:
        try:
            bars.append((name, value(), style))
        except KeyError:
            continue
    about = results["about"]
    notes = [
        about["processor"],
        *(f"{name} {version}" for name, version in about["versions"].items()),
        "Random float16 weights, greedy, no quantization.",
        *([f"Steps of our engine: {results['step runner']['kind']}"] if "step runner" in results else []),
        "The roofline is the measured read bandwidth divided by the bytes of the weights.",
    ]
    title = f"Decoding, Llama-2-{about['shape'].upper()}"
    chart = bar_panel(title, "tokens/s of one request after a prompt of 128 tokens", bars)
    measured_on = f"Measured on {about['date']}"
    return render_svg(measured_on, [chart, notes_panel(measured_on, notes)])
