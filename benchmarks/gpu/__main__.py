"""Measure the GPU path: `make bench-gpu`, or `python -m benchmarks.gpu` if the packages are already installed.

It runs the tests that need a GPU. Then it measures ceilings, the engine only, transformers, a profile of one step,
loading, and the service with its client in another process. Weights are random, have Llama-2-7B's shape, and are
created on the device. The results go to benchmarks/results/. Without a GPU, `--shape tiny --device cpu` tests the
benchmark itself.
"""

import argparse
import gc
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.chart import draw_svg
from benchmarks.gpu.measurement import ceilings, loading
from benchmarks.gpu.measurement.engine_only import EngineOnly
from benchmarks.gpu.measurement.transformers_generate import TransformersGenerate
from benchmarks.gpu.models import SHAPES, random_model
from benchmarks.gpu.report import report
from llama2_server.engine.cuda.build import build_step_runner
from llama2_server.engine.engine import Engine

CONTEXT_LENGTH = 3072
RESULTS = Path(__file__).parent.parent / "results"
# Packages of the service beyond the engine's. If one is missing, the service is not measured.
SERVICE_PACKAGES = ("grpc_health", "grpc_reflection", "pydantic_settings", "structlog", "sqlalchemy", "jsonschema")
TESTS = ("-m", "pytest", "-c", "benchmarks/gpu/pytest.ini", "--rootdir", ".", "--confcutdir", "tests/unit/engine")


def main() -> None:
    """Parse the flags, measure, write the results and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="Shape of the model.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="Device to measure.")
    parser.add_argument(
        "--rows", type=int, default=16, help="Number of simultaneous requests, and of slots of the engine."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder for the results.")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU; test the benchmark itself with --shape tiny --device cpu")
    results: dict[str, Any] = {}
    for name, result in measure_all(arguments.shape, arguments.device, arguments.rows):
        print(f"{name}: {result}", file=sys.stderr, flush=True)
        results[name] = result
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{results['about']['date']}-gpu-{arguments.shape}"
    (arguments.out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib"):
        (arguments.out / f"{name}.svg").write_text(draw_svg(results), encoding="utf-8")
    else:
        print("no chart: matplotlib is not installed", file=sys.stderr)
    print(report(results))


def measure_all(shape: str, device: str, rows: int) -> Iterator[tuple[str, Any]]:
    """Measure each part and yield its name and results; units are seconds and bytes."""
    yield "about", environment(shape, device)
    if device == "cuda":
        yield "tests", run_gpu_tests()
    large = device == "cuda"
    sizes = {"size_bytes": 2**33, "matrix": 8192} if large else {"size_bytes": 2**24, "matrix": 256}
    yield "ceilings", asdict(ceilings.measure(device, **sizes))
    yield from measure_in_process(shape, device, rows)
    if device == "cuda":  # the server process needs the memory
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    yield "loading", dict(zip(("read", "load"), loading.bytes_per_second(shape, device), strict=True))
    yield "service", measure_service(shape, device)


def environment(shape: str, device: str) -> dict[str, Any]:
    """Return date, machine and versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "grpcio")}
    about = {"date": time.strftime("%Y-%m-%d"), "shape": shape, "device": device, "versions": versions}
    if device == "cpu":
        return about | {"processor": platform.machine()}
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions |= {"triton": metadata.version("triton"), "CUDA": str(torch.version.cuda), "driver, memory": driver}
    return about | {"processor": torch.cuda.get_device_name()}


def run_gpu_tests() -> str:
    """Run the tests that need a GPU and return the last line of their output."""
    command = [sys.executable, *TESTS, "--import-mode=importlib", "-q", "tests/unit/engine/cuda", "-m", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return (done.stdout.strip().splitlines() or ["not run"])[-1]


def measure_in_process(shape: str, device: str, rows: int) -> Iterator[tuple[str, Any]]:
    """Measure the engine only, transformers with the same memory, and the profile of a step."""
    model = random_model(shape, device, slots=rows, context_length=CONTEXT_LENGTH)
    started_at = time.perf_counter()
    step_runner = build_step_runner(model, compiled=True, cache_directory=None)
    yield "step runner", {"seconds": time.perf_counter() - started_at, "kind": type(step_runner).__name__}
    engine = Engine(model, frozenset(), step_runner=step_runner)
    engine_only = EngineOnly(engine, model.vocab_size)
    yield "one row", _speed(engine_only, prompt_tokens=128, new_tokens=128)
    yield "one row, sampled", _speed(engine_only, prompt_tokens=128, new_tokens=128, temperature=0.6)
    yield "long context", _speed(engine_only, prompt_tokens=2500, new_tokens=64)
    yield "rows at once", _speed(engine_only, prompt_tokens=128, new_tokens=128, rows=rows)
    yield "prefill", _speed(engine_only, prompt_tokens=2048, new_tokens=2)
    yield "memory", {"bytes": model.memory_bytes}
    engine.close()
    transformers = TransformersGenerate(model)
    yield "transformers.generate", {"tokens_per_second": transformers.tokens_per_second(128, 128)}
    if device == "cuda":
        static = transformers.tokens_per_second(128, 128, cache_implementation="static")
        yield "transformers.generate, static cache and compile", {"tokens_per_second": static}
        yield from _profile(step_runner, model.vocab_size)


def _speed(engine_only: EngineOnly, **options: Any) -> dict[str, Any]:
    return options | asdict(engine_only.speed(**options))


def _profile(step_runner: Any, vocab_size: int) -> Iterator[tuple[str, Any]]:
    if type(step_runner).__name__ == "CudaStepRunner":
        from benchmarks.gpu.measurement.kernel_profile import profile_step  # needs CUDA

        seconds, kernels = profile_step(step_runner, [3 + index % (vocab_size - 3) for index in range(128)])
        yield "profile", {"step_seconds": seconds, "kernels": [asdict(kernel) for kernel in kernels]}


def measure_service(shape: str, device: str) -> dict[str, Any]:
    """Measure the service, or return which packages are missing."""
    missing = [name for name in SERVICE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return {"not run": f"missing packages: {', '.join(missing)}"}
    from benchmarks.gpu.measurement.service import measure  # needs SERVICE_PACKAGES

    speed, first_start, second_start = measure(shape, device, new_tokens=128)
    return asdict(speed) | {"first_start_seconds": first_start, "second_start_seconds": second_start}


if __name__ == "__main__":
    main()
