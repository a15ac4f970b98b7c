"""The plot of a soak test."""

from pathlib import Path

from matplotlib.figure import Figure
from tests.reliability.soak.samples import Sample, after_warm_up, drifts


def draw_plot(samples: list[Sample], path: Path) -> None:
    """Draw memory, file descriptors and threads over the requests, and write the picture."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    requests = [sample.requests for sample in samples]
    first = after_warm_up(samples)[0].requests
    start = samples[0].memory_mb
    curves = {
        "memory (MB)": [sample.memory_mb - start for sample in samples],
        "file descriptors": [sample.files for sample in samples],
        "threads": [sample.threads for sample in samples],
    }
    found = drifts(samples)
    for axes, (name, values) in zip(figure.subplots(3, sharex=True), curves.items(), strict=True):
        axes.plot(requests, values, linewidth=1)
        axes.axvspan(0, first, color="0.9")
        axes.set_ylim(min(0.0, *values), max(1.0, 1.15 * max(values)))
        axes.set_ylabel(f"{name} since the start" if name.startswith("memory") else name)
        axes.set_title(f"{name}: {found[name]:+.2f} per 10,000 requests after the warm-up (gray)", fontsize=10)
    axes.set_xlabel(f"requests, in {samples[-1].seconds / 60:.1f} minutes")
    figure.savefig(path, dpi=100)
