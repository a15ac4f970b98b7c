"""Writes the table of all metrics in docs/telemetry.md from the metrics themselves; a test fails when it is stale.

`python -m tools.metrics_reference`
"""

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from llama2_server.telemetry.metrics import Metrics

PAGE = Path(__file__).parent.parent / "docs/telemetry.md"
BEGIN = "<!-- metrics: made by `python -m tools.metrics_reference` -->\n"
END = "<!-- end of metrics -->\n"


def main() -> None:
    """Put a fresh table into the page."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(page: str) -> str:
    """The page with a fresh table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(_table()) + END + after


def _table() -> Iterator[str]:
    metrics = Metrics(CollectorRegistry())
    # Each metric with labels shows them by a series.
    metrics.preregister_methods(["some.Service/Method"])
    metrics.set_build(version="", model="", device="", dtype="")
    yield "| metric | type | labels | what it says |\n|---|---|---|---|\n"
    for metric in sorted(metrics.registry.collect(), key=lambda metric: metric.name):
        if metric.name.startswith("llama2_"):
            yield f"| `{_shown_name(metric)}` | {metric.type} | {_labels(metric)} | {metric.documentation} |\n"


def _shown_name(metric: Metric) -> str:
    """The name in queries, where it has one."""
    return metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")


def _labels(metric: Metric) -> str:
    names = {name: None for sample in metric.samples for name in sample.labels if name != "le"}
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
