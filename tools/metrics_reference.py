"""Write the table of all metrics in docs/telemetry.md from the metrics themselves; a test fails if it is stale.

`python -m tools.metrics_reference`
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.health import HealthServicer, ReadinessCollector
from llama2_server.card import RequestsPerMinute
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.generation.replicas.shared_replies import SharedReplies
from llama2_server.generation.response_cache import ResponseCacheCollector
from llama2_server.idempotency.metrics import KeyMetrics
from llama2_server.telemetry.metrics import Metrics
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.metrics import LedgerCollector

PAGE = Path(__file__).parent.parent / "docs/telemetry.md"
BEGIN = "<!-- metrics: made by `python -m tools.metrics_reference` -->\n"
END = "<!-- end of metrics -->\n"


@dataclass(frozen=True)
class _NoModel:
    device: str = ""
    dtype: str = ""
    kernels: str = ""
    memory_bytes: int = 0


def main() -> None:
    """Write the current table into the page."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(page: str) -> str:
    """Return the page with the current table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(_table(asyncio.run(_metrics()))) + END + after


async def _metrics() -> list[Metric]:
    """Collect the metrics of every part of the server."""
    metrics = Metrics(CollectorRegistry())
    with TemporaryDirectory() as directory:
        ledger = await Ledger.open(data_directory=Path(directory), neuron_costs={})
        collectors = (
            RequestQueue(1, max_queue_size=1, queue_timeout_seconds=1.0),
            Quota(RequestsPerMinute(default=1)),
            ResponseCacheCollector(None),
            ReadinessCollector(HealthServicer(())),
            LedgerCollector(ledger),
            KeyMetrics(),
            SharedReplies(None, Fingerprint({}, "")),
        )
        # A metric with labels shows them only if it has a series.
        metrics.register("", _NoModel(), "", ["some.Service/Method"], collectors)
        collected = list(metrics.registry.collect())
        await ledger.close()
    return collected


def _table(metrics: list[Metric]) -> Iterator[str]:
    yield "| metric | type | labels | description |\n|---|---|---|---|\n"
    for metric in sorted(metrics, key=lambda metric: metric.name):
        if metric.name.startswith("llama2_"):
            yield f"| `{_shown_name(metric)}` | {metric.type} | {_labels(metric)} | {metric.documentation} |\n"


def _shown_name(metric: Metric) -> str:
    """Return the metric's name in queries."""
    return metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")


def _labels(metric: Metric) -> str:
    names = {name: None for sample in metric.samples for name in sample.labels if name != "le"}
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
