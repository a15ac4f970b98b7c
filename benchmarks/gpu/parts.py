"""The parts of the GPU benchmark. Each one creates its own model."""

import gc
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.measurement import ceilings, loading
from benchmarks.gpu.measurement.engine_only import EngineOnly
from benchmarks.gpu.measurement.transformers_generate import TransformersGenerate
from benchmarks.gpu.models import random_model
from llama2_server.engine.cuda.build import GpuKernels, build_step_runner
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import StepKind

CONTEXT_LENGTH = 3072
PROFILED_PROMPT_TOKENS = 128
TESTS = ("-m", "pytest", "-c", "benchmarks/gpu/pytest.ini", "--rootdir", ".", "--confcutdir", "tests/unit/engine")


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: a shape of SHAPES, a device of torch, and the number of simultaneous requests."""

    shape: str
    device: str
    rows: int

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU; otherwise the run only tests the benchmark itself."""
        return self.device == "cuda"

    def model(self, slots: int) -> LlamaModel:
        """Return a model with random weights."""
        return random_model(self.shape, self.device, slots=slots, context_length=CONTEXT_LENGTH)

    def free_memory(self) -> None:
        """Return the device's memory; the next part, or the server's process, needs it."""
        gc.collect()
        if self.on_gpu:
            torch._dynamo.reset()
            torch.cuda.empty_cache()


Measured = Iterator[tuple[str, Any]]
"""Names and results as they are measured; units are seconds and bytes."""


def about(target: Target) -> dict[str, Any]:
    """Return date, machine and versions."""
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
    model = target.model(target.rows)
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

    model = target.model(1)
    step_runner = build_step_runner(model, kernels="auto", cache_directory=None)
    if step_runner.kind is not StepKind.CUDA_GRAPHS:
        raise SystemExit(f"the step runs as {step_runner.kind}, not in CUDA graphs; see its messages above")
    prompt = [3 + index % (model.vocab_size - 3) for index in range(PROFILED_PROMPT_TOKENS)]
    seconds, kernels = profile_step(step_runner, prompt)  # type: ignore[arg-type]
    yield "profile", {"step_seconds": seconds, "kernels": [asdict(kernel) for kernel in kernels]}


def measure_service(target: Target) -> Measured:
    """Measure the service over gRPC, with its client in this process."""
    from benchmarks.gpu.measurement.service import measure  # needs the packages of the service

    speed, first, second = measure(target.shape, target.device, new_tokens=128)
    starts = {"first_start_seconds": first.seconds, "second_start_seconds": second.seconds}
    loads = {"first_load_seconds": first.load_seconds, "second_load_seconds": second.load_seconds}
    yield "service", asdict(speed) | starts | loads


def measure_loading(target: Target) -> Measured:
    """Measure the loading of a checkpoint, from the disk and from the page cache."""
    yield "loading", asdict(loading.measure(target.shape, target.device))


def run_tests(target: Target) -> Measured:
    """Run the tests that need a GPU; the result is the last line of their output."""
    if not target.on_gpu:
        return
    command = [sys.executable, *TESTS, "--import-mode=importlib", "-q", "tests/unit/engine/cuda", "-m", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    yield "tests", (done.stdout.strip().splitlines() or ["not run"])[-1]


def measure_peers(target: Target) -> Measured:
    """Measure transformers, plain and with a static cache and compile."""
    transformers = TransformersGenerate(target.model(1))
    yield "transformers.generate", {"tokens_per_second": transformers.tokens_per_second(128, 128)}
    if target.on_gpu:
        static = transformers.tokens_per_second(128, 128, cache_implementation="static")
        yield "transformers.generate, static cache and compile", {"tokens_per_second": static}


# In this order: what only this project can measure comes first, in case that a run is cut off.
PARTS: dict[str, Callable[[Target], Measured]] = {
    "ceilings": measure_ceilings,
    "engine": measure_engine,
    "fused": measure_fused,
    "profile": measure_profile,
    "service": measure_service,
    "tests": run_tests,
    "loading": measure_loading,
    "peers": measure_peers,
}


def _speed(engine_only: EngineOnly, **options: Any) -> dict[str, Any]:
    return options | asdict(engine_only.speed(**options))
