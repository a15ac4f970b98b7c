"""The picture of a run on a GPU, for the README."""

from collections.abc import Callable

from benchmarks.gpu.report import ONE, PEER, STATIC, Figures, Results
from benchmarks.svg import Look, bar_chart, document, note_chart

OURS, OTHERS = "#d9480f", "#7d8590"


def picture(results: Results) -> str:
    """An SVG with the decode speeds beside the roofline, and what they hold for; what was not measured is left out."""
    figures = Figures(results)
    ways: list[tuple[str, Callable[[], float], Look]] = [
        ("roofline", lambda: figures.roofline, Look(OTHERS, dashed=True)),
        ("our engine", lambda: figures.speed(ONE), Look("#e8842c")),
        ("our service", lambda: figures.speed("service"), Look(OURS, bold=True)),
        ("transformers, static", lambda: figures.speed(STATIC), Look(OTHERS)),
        ("transformers", lambda: figures.speed(PEER), Look(OTHERS)),
    ]
    bars = []
    for name, value, look in ways:
        try:
            bars.append((name, value(), look))
        except KeyError:
            continue
    about = results["about"]
    notes = [
        about["processor"],
        *(f"{name} {version}" for name, version in about["versions"].items()),
        "Random float16 weights, greedy, no quantization.",
        "The roofline is the measured read bandwidth over the weights' bytes.",
    ]
    title = f"Decoding, Llama-2-{about['shape'].upper()}"
    chart = bar_chart(title, "tokens/s of one request, after a prompt of 128", bars)
    return document(f"Measured on {about['date']}", [chart, note_chart(f"Measured on {about['date']}", notes)])
