"""What the metrics show of the parts whenever they are scraped."""

from functools import partial
from importlib.metadata import version

from llama2_server.api.health import HealthServicer
from llama2_server.api.server import METHODS
from llama2_server.api.text_generation import Parts
from llama2_server.engine.model.interface import Model
from llama2_server.telemetry.metrics import GaugeSnapshot, Metrics


def show(metrics: Metrics, parts: Parts, model: Model, health: HealthServicer) -> None:
    """Let the metrics look at the parts."""
    dtype = str(model.dtype).removeprefix("torch.")
    release = version("llama2-grpc")
    metrics.set_build(version=release, model=parts.card.name, device=str(model.device), dtype=dtype)
    metrics.preregister_methods(METHODS)
    metrics.read_from(partial(_readings, parts, model, health))


def _readings(parts: Parts, model: Model, health: HealthServicer) -> GaugeSnapshot:
    return GaugeSnapshot(
        requests_queued=parts.slots.waiting,
        requests_running=parts.slots.running,
        max_concurrent_requests=parts.card.max_concurrent_requests,
        ready=health.serving,
        response_cache_hits=parts.cache.hits if parts.cache is not None else 0,
        response_cache_misses=parts.cache.misses if parts.cache is not None else 0,
        response_cache_bytes=parts.cache.bytes_used if parts.cache is not None else 0,
        quota_store_errors=parts.quota.store_failures,
        quota_store_up=parts.quota.store_up,
        usage_lag_seconds=parts.ledger.lag_seconds,
        usage_pending_records=parts.ledger.pending,
        usage_journal_bytes=parts.ledger.journal_bytes,
        device_memory_bytes=model.memory_bytes,
    )
