"""Autotuning: find the fastest variant of each one-row matmul on this device, and cache the result in a file.

The variants sum in different orders. The chosen ones are a part of the fingerprint (`StepRunner.kernel_choices`), and
the cached ones are used again after a restart.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from llama2_server.engine.cuda import matmul_kernels
from llama2_server.engine.cuda.driver import driver_versions
from llama2_server.engine.cuda.matmul import VARIANTS, Matmul, MatmulVariant, matmul_name
from llama2_server.engine.cuda.matmul_kernels import TileConfig
from llama2_server.engine.disk_cache import load, save
from llama2_server.engine.model.llama import LlamaModel

logger = logging.getLogger(__name__)

# Two summation orders of the same float16 products differ by about 0.001.
MAX_RELATIVE_ERROR = 0.01
REPLAYS = 5
# The variants take turns, because the clock of a cold or busy card changes; the minimum of the rounds counts.
ROUNDS = 5

Workload = Callable[[Matmul], Tensor]
"""One matmul with the weights of all layers in sequence, so that no cache holds them; returns the last result."""
Timer = Callable[[], float]
"""Measures one workload once, in seconds."""


def autotune(model: LlamaModel, file: Path | None) -> dict[str, MatmulVariant]:
    """Return the fastest variant of each matmul by name, from the file if it matches this device and software."""
    key = _cache_key(model.device)
    variants = _parse_variants(load(file, key))
    workloads = dict(matmul_workloads(model))
    if variants.keys() != workloads.keys():
        epsilon = model.config.rms_norm_eps
        variants = {name: fastest_variant(workload, epsilon, name) for name, workload in workloads.items()}
        save(file, key, {name: astuple(variant) if variant else None for name, variant in variants.items()})
    return variants


def _cache_key(device: torch.device) -> str:
    """Return what the speed of the variants depends on: card, driver, software and the source of the kernels."""
    source = hashlib.sha256(Path(matmul_kernels.__file__).read_bytes()).hexdigest()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{torch.cuda.get_device_name(device)}, driver {driver_versions()}, {versions}, kernels {source}"


def graph_timer(run: Callable[[], Tensor]) -> Timer:
    """Return a timer of `run` in a CUDA graph, which excludes the host's kernel launch overhead."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()

    def measure() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / REPLAYS

    return measure


def fastest_variant(
    workload: Workload, epsilon: float, name: str, timer: Callable[[Callable[[], Tensor]], Timer] = graph_timer
) -> MatmulVariant:
    """Return the fastest variant of a matmul whose result equals torch's except for rounding."""
    timers = {variant: timer(run) for variant, run in _correct_variants(workload, epsilon, name)}
    seconds = dict.fromkeys(timers, float("inf"))
    for _ in range(ROUNDS):
        for variant, measure in timers.items():
            seconds[variant] = min(seconds[variant], measure())
    best = min(seconds, key=lambda variant: seconds[variant])
    logger.info("fastest matmul variant of %s: %s, %.1f us per pass", name, best or "torch", seconds[best] * 1e6)
    return best


def _correct_variants(
    workload: Workload, epsilon: float, name: str
) -> Iterator[tuple[MatmulVariant, Callable[[], Tensor]]]:
    """Yield each variant whose result is right, and the workload with it; torch is the first."""
    expected = workload(Matmul(epsilon)).double()
    for variant in VARIANTS:
        matmul = Matmul(epsilon, {name: variant})
        error = (workload(matmul).double() - expected).norm() / expected.norm()
        if error < MAX_RELATIVE_ERROR:
            yield variant, partial(workload, matmul)
        else:  # also if the error is not a number
            logger.warning("matmul variant rejected: %s with %s has a relative error of %.3f", name, variant, error)


def matmul_workloads(model: LlamaModel) -> Iterator[tuple[str, Workload]]:
    """Yield the name of each matmul of a step, and its workload: one row of random activations."""
    config, weights = model.config, model.weights
    first = weights.layers[0]

    def random_row(size: int) -> Tensor:
        return torch.randn(1, size, device=model.device).to(model.dtype)

    x, attended = random_row(config.hidden_size), random_row(config.query_size)
    inner = random_row(config.intermediate_size)

    def all_layers(matmul: Callable[..., Tensor]) -> Tensor:
        for layer in weights.layers:
            result = matmul(layer)
        return result

    yield (
        matmul_name("rmsnorm_linear", first.qkv),
        lambda matmul: all_layers(lambda layer: matmul.rmsnorm_linear(x, layer.attention_norm, layer.qkv)),
    )
    yield (
        matmul_name("linear_residual", first.output),
        lambda matmul: all_layers(lambda layer: matmul.linear_residual(x, attended, layer.output)),
    )
    yield (
        matmul_name("swiglu", first.gate_up),
        lambda matmul: all_layers(lambda layer: matmul.swiglu(x, layer.mlp_norm, layer.gate_up)),
    )
    yield (
        matmul_name("linear_residual", first.down),
        lambda matmul: all_layers(lambda layer: matmul.linear_residual(x, inner, layer.down)),
    )
    yield matmul_name("lm_head", weights.head), lambda matmul: matmul.lm_head(x, weights.norm, weights.head)


def _parse_variants(stored: Any) -> dict[str, MatmulVariant]:
    try:
        return {name: TileConfig(*variant) if variant else None for name, variant in stored.items()}
    except (TypeError, AttributeError):  # nothing was stored, or something else
        return {}
