"""Which way of computing each product of one row is the fastest on this device: measured once, then kept in a file."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from llama2_server.engine.cuda.matmul import VARIANTS, Matmul, MatmulVariant, name_of
from llama2_server.engine.cuda.matmul_kernels import TileConfig
from llama2_server.engine.disk_cache import load, save
from llama2_server.engine.model.llama import LlamaModel

logger = logging.getLogger(__name__)

# Two ways of adding the same float16 products differ by about a thousandth.
MAX_RELATIVE_ERROR = 0.01
REPLAYS = 5

Work = Callable[[Matmul], Tensor]
"""One product with the weights of all layers, one after another, so that no cache holds them; the last result."""
Timer = Callable[[Callable[[], Tensor]], float]


def autotune(model: LlamaModel, file: Path | None) -> dict[str, MatmulVariant]:
    """The fastest way of each product of the model, by its name; from the file if it is of this device and software."""
    key = f"{torch.cuda.get_device_name(model.device)}, torch {torch.__version__}, triton {triton.__version__}"
    known = _ways(load(file, key))
    works = dict(_works(model))
    if known.keys() != works.keys():
        known = {name: fastest(work, model.config.rms_norm_eps, name) for name, work in works.items()}
        save(file, key, {name: astuple(way) if way else None for name, way in known.items()})
    return known


def graph_seconds(run: Callable[[], Tensor]) -> float:
    """How long the device takes, without the time that the host needs to ask for each kernel."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begun.record()
    for _ in range(REPLAYS):
        graph.replay()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1000 / REPLAYS


def fastest(work: Work, epsilon: float, name: str, seconds: Timer = graph_seconds) -> MatmulVariant:
    """The fastest way of a product, among those whose result is torch's but for rounding."""
    expected = work(Matmul(epsilon)).double()
    best, best_seconds = None, float("inf")
    for way in VARIANTS:
        products = Matmul(epsilon, {name: way})
        error = (work(products).double() - expected).norm() / expected.norm()
        if not error < MAX_RELATIVE_ERROR:
            logger.warning("%s: %s is wrong by %.3f on this device and is not used", name, way, error)
            continue
        needed = seconds(lambda products=products: work(products))  # type: ignore[misc]
        if needed < best_seconds:
            best, best_seconds = way, needed
    logger.info("%s: %s, %.1f us a pass", name, best or "torch", best_seconds * 1e6)
    return best


def _works(model: LlamaModel) -> Iterator[tuple[str, Work]]:
    config, weights = model.config, model.weights
    first = weights.layers[0]

    def some(size: int) -> Tensor:
        return torch.randn(1, size, device=model.device).to(model.dtype)

    x, attended, inner = some(config.hidden_size), some(config.query_size), some(config.intermediate_size)

    def each(product: Callable[..., Tensor]) -> Tensor:
        for layer in weights.layers:
            result = product(layer)
        return result

    yield (
        name_of("normed", first.qkv),
        lambda products: each(lambda layer: products.normed(x, layer.attention_norm, layer.qkv)),
    )
    yield (
        name_of("added", first.output),
        lambda products: each(lambda layer: products.added(x, attended, layer.output)),
    )
    yield (
        name_of("gated", first.gate_up),
        lambda products: each(lambda layer: products.gated(x, layer.mlp_norm, layer.gate_up)),
    )
    yield name_of("added", first.down), lambda products: each(lambda layer: products.added(x, inner, layer.down))
    yield name_of("logits", weights.head), lambda products: products.logits(x, weights.norm, weights.head)


def _ways(kept: Any) -> dict[str, MatmulVariant]:
    try:
        return {name: TileConfig(*way) if way else None for name, way in kept.items()}
    except (TypeError, AttributeError):  # nothing was kept, or no ways
        return {}
