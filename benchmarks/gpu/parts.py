"""The parts of the GPU benchmark. Each runs in a separate process, with a time limit, and creates its own model."""

import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.measurement import ceilings, gpu_tests, loading
from benchmarks.gpu.measurement.engine_only import EngineOnly
from benchmarks.gpu.models import random_model
from benchmarks.gpu.target import Target
from llama2_server.engine.cuda.build import GpuKernels, build_step_runner
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import StepKind

CONTEXT_LENGTH = 3072
PROFILED_PROMPT_TOKENS = 128
PEER_PROMPT_TOKENS = 128
ABOUT_LIMIT_SECONDS = 30

Measured = Iterator[tuple[str, Any]]
"""Measured names and results; units are seconds and bytes."""


class Part(NamedTuple):
    """A part of the benchmark, and the time after which it is ended; its results until then are kept."""

    measure: Callable[[Target], Measured]
    limit_seconds: float


def about(target: Target) -> dict[str, Any]:
    """Return date, machine and versions."""
    if target.on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU; test the benchmark itself with --shape tiny --device cpu")
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "grpcio")}
    found = {"date": time.strftime("%Y-%m-%d"), "shape": target.shape, "device": target.device, "versions": versions}
    if not target.on_gpu:
        return found | {"processor": platform.machine()}
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions |= {"triton": metadata.version("triton"), "CUDA": str(torch.version.cuda), "driver, memory": driver}
    return found | {"processor": torch.cuda.get_device_name()}


def measure_ceilings(target: Target) -> Measured:
    """Measure what the device can do at most."""
    sizes = {"size_bytes": 2**33, "matrix": 8192} if target.on_gpu else {"size_bytes": 2**24, "matrix": 256}
    yield "ceilings", asdict(ceilings.measure(target.device, **sizes))


def measure_engine(target: Target) -> Measured:
    """Measure the engine without the service."""
    return _measure_engine(target, "auto", "")


def measure_fused(target: Target) -> Measured:
    """Measure the same with the kernels of `--gpu-kernels fused`; the fingerprint's entries tell which were used."""
    return _measure_engine(target, "fused", ", fused")


def _measure_engine(target: Target, kernels: GpuKernels, suffix: str) -> Measured:
    model = _model(target, target.rows)
    started_at = time.perf_counter()
    step_runner = build_step_runner(model, kernels=kernels, cache_directory=None)
    about_step = {"kind": step_runner.kind.value, "choices": step_runner.kernel_choices}
    yield "step runner" + suffix, {"seconds": time.perf_counter() - started_at} | about_step
    engine = Engine(model, frozenset(), step_runner=step_runner)
    try:
        engine_only = EngineOnly(engine, model.vocab_size)
        yield "one row" + suffix, _speed(engine_only, prompt_tokens=128, new_tokens=128)
        yield "one row, sampled" + suffix, _speed(engine_only, prompt_tokens=128, new_tokens=128, temperature=0.6)
        yield "long context" + suffix, _speed(engine_only, prompt_tokens=2500, new_tokens=64)
        yield "rows at once" + suffix, _speed(engine_only, prompt_tokens=128, new_tokens=128, rows=target.rows)
        yield "prefill" + suffix, _speed(engine_only, prompt_tokens=2048, new_tokens=2)
        yield "memory" + suffix, {"bytes": model.memory_bytes}
    finally:
        engine.close()


def measure_profile(target: Target) -> Measured:
    """Measure the kernels of one decode step of one row."""
    if not target.on_gpu:
        return
    from benchmarks.gpu.measurement.kernel_profile import profile_step  # needs CUDA

    model = _model(target, 1)
    step_runner = build_step_runner(model, kernels="auto", cache_directory=None)
    if step_runner.kind is not StepKind.CUDA_GRAPHS:
        raise SystemExit(f"the step runs as {step_runner.kind}, not in CUDA graphs; see its messages above")
    prompt = [3 + index % (model.vocab_size - 3) for index in range(PROFILED_PROMPT_TOKENS)]
    seconds, kernels = profile_step(step_runner, prompt)  # type: ignore[arg-type]
    yield "profile", {"step_seconds": seconds, "kernels": [asdict(kernel) for kernel in kernels]}


def measure_kernels(target: Target) -> Measured:
    """Measure each kernel alone, and the matmuls of a step one after another, with and without overlap."""
    from benchmarks.gpu.measurement import kernels  # needs Triton

    return kernels.measure(_model(target, target.rows if target.on_gpu else 1))


def measure_service(target: Target) -> Measured:
    """Measure the service over gRPC, with its client in this process."""
    from benchmarks.gpu.measurement import service  # needs the packages of the service

    return _growing("service", service.measure(target.shape, target.device, new_tokens=128))


def run_tests(target: Target) -> Measured:
    """Run the tests that need a GPU, and the tests of the kernels on the GPU."""
    return gpu_tests.run(on_gpu=target.on_gpu)


def measure_loading(target: Target) -> Measured:
    """Measure the loading of a checkpoint, from the page cache and from the disk."""
    return _growing("loading", loading.measure(target.shape, target.device))


def _growing(name: str, parts: Iterator[dict[str, float]]) -> Measured:
    """Yield one result again with each part of it, so that a time limit does not lose the others."""
    result: dict[str, float] = {}
    for part in parts:
        result |= part
        yield name, dict(result)


def measure_transformers(target: Target) -> Measured:
    """Measure transformers, plain and with a static cache and compile."""
    from benchmarks.gpu.measurement.transformers_generate import TransformersGenerate  # slow to import

    transformers = TransformersGenerate(_model(target, 1))
    new_tokens = _peer_tokens(target)
    plain = transformers.tokens_per_second(PEER_PROMPT_TOKENS, new_tokens)
    yield "transformers.generate", {"tokens_per_second": plain}
    if target.on_gpu:
        static = transformers.tokens_per_second(PEER_PROMPT_TOKENS, new_tokens, cache_implementation="static")
        yield "transformers.generate, static cache and compile", {"tokens_per_second": static}


def measure_compiled_step(target: Target) -> Measured:
    """Measure a compiled step in plain torch, as gpt-fast does it."""
    from benchmarks.gpu.measurement.compiled_step import CompiledStep

    compiled = CompiledStep(_model(target, 1), context_length=256)
    speed = compiled.tokens_per_second(PEER_PROMPT_TOKENS, _peer_tokens(target))
    yield "compiled step", {"tokens_per_second": speed}


def check_memory_accesses(target: Target) -> Measured:
    """Run the tests of the kernels in compute-sanitizer."""
    return gpu_tests.sanitize() if target.on_gpu else iter(())


# In this order: what only this project can measure comes first, in case that a run is cut off. README.md divides them
# into runs of less than ten minutes.
PARTS = {
    "ceilings": Part(measure_ceilings, 20),
    "engine": Part(measure_engine, 110),
    "fused": Part(measure_fused, 140),
    "profile": Part(measure_profile, 60),
    "kernels": Part(measure_kernels, 90),
    "service": Part(measure_service, 120),
    "tests": Part(run_tests, 180),
    "loading": Part(measure_loading, 70),
    "transformers": Part(measure_transformers, 150),
    "compiled": Part(measure_compiled_step, 140),
    "sanitizer": Part(check_memory_accesses, 540),
}


def _model(target: Target, slots: int) -> LlamaModel:
    return random_model(target.shape, target.device, slots=slots, context_length=CONTEXT_LENGTH)


def _peer_tokens(target: Target) -> int:
    return 128 if target.on_gpu else 8  # as `one row`


def _speed(engine_only: EngineOnly, **options: Any) -> dict[str, Any]:
    return options | asdict(engine_only.speed(**options))
