"""Measures the GPU path: `make bench-gpu`, or `python -m benchmarks.gpu` where the packages are there already.

First the tests that need a GPU; then ceilings, bare engine, transformers, a profile of one step, loading, and the
service with its client in another process. Weights are random, of Llama-2-7B's shape, made on the device. The results
go to benchmarks/results/. `--shape tiny --device cpu` tries the benchmark itself where there is no GPU.
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

from benchmarks.gpu.measurement import ceilings, loading
from benchmarks.gpu.measurement.engine_only import BareEngine
from benchmarks.gpu.models import SHAPES, random_model
from benchmarks.gpu.measurement.transformers_generate import TransformersGenerate
from benchmarks.gpu.chart import picture
from benchmarks.gpu.report import report
from llama2_server.engine.cuda.build import build_step_runner
from llama2_server.engine.engine import Engine

CONTEXT_LENGTH = 3072
RESULTS = Path(__file__).parent.parent / "results"
# What the service needs beyond the engine; where one is missing it is not run, and the report says so.
SERVICE_NEEDS = ("grpc_health", "grpc_reflection", "pydantic_settings", "structlog", "sqlalchemy", "jsonschema")
TESTS = ("-m", "pytest", "-c", "benchmarks/gpu/pytest.ini", "--rootdir", ".", "--confcutdir", "tests/unit/engine")


def main() -> None:
    """Parse the flags, measure, write the results, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", type=int, default=16, help="requests at once, and slots of the bare engine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --shape tiny --device cpu tries the benchmark itself")
    results: dict[str, Any] = {}
    for name, found in measurements(arguments.shape, arguments.device, arguments.rows):
        print(f"{name}: {found}", file=sys.stderr, flush=True)
        results[name] = found
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{results['about']['date']}-gpu-{arguments.shape}"
    (arguments.out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.out / f"{name}.svg").write_text(picture(results), encoding="utf-8")
    print(report(results))


def measurements(shape: str, device: str, rows: int) -> Iterator[tuple[str, Any]]:
    """Each part's name and figures, one after another; seconds and bytes throughout."""
    yield "about", about(shape, device)
    if device == "cuda":
        yield "tests", tests()
    large = device == "cuda"
    sizes = {"size_bytes": 2**33, "matrix": 8192} if large else {"size_bytes": 2**24, "matrix": 256}
    yield "ceilings", asdict(ceilings.measure(device, **sizes))
    yield from in_process(shape, device, rows)
    if device == "cuda":  # the server is a process of its own, and needs the room
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    yield "loading", dict(zip(("read", "load"), loading.bytes_per_second(shape, device), strict=True))
    yield "service", service(shape, device)


def about(shape: str, device: str) -> dict[str, Any]:
    """Date, machine and versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "grpcio")}
    found = {"date": time.strftime("%Y-%m-%d"), "shape": shape, "device": device, "versions": versions}
    if device == "cpu":
        return found | {"processor": platform.machine()}
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions |= {"triton": metadata.version("triton"), "CUDA": str(torch.version.cuda), "driver, memory": driver}
    return found | {"processor": torch.cuda.get_device_name()}


def tests() -> str:
    """The last line of what the tests that need a GPU say."""
    command = [sys.executable, *TESTS, "--import-mode=importlib", "-q", "tests/unit/engine/cuda", "-m", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return (done.stdout.strip().splitlines() or ["they did not run"])[-1]


def in_process(shape: str, device: str, rows: int) -> Iterator[tuple[str, Any]]:
    """The bare engine, transformers over the same memory, and the profile."""
    model = random_model(shape, device, slots=rows, context_length=CONTEXT_LENGTH)
    begun = time.perf_counter()
    step_runner = build_step_runner(model, compiled=True, cache_directory=None)
    yield "building steps", {"seconds": time.perf_counter() - begun, "kind": type(step_runner).__name__}
    engine = Engine(model, frozenset(), step_runner=step_runner)
    bare = BareEngine(engine, model.vocab_size)
    yield "one row", _speed(bare, prompt_tokens=128, new_tokens=128)
    yield "one row, sampled", _speed(bare, prompt_tokens=128, new_tokens=128, temperature=0.6)
    yield "long context", _speed(bare, prompt_tokens=2500, new_tokens=64)
    yield "rows at once", _speed(bare, prompt_tokens=128, new_tokens=128, rows=rows)
    yield "prefill", _speed(bare, prompt_tokens=2048, new_tokens=2)
    yield "memory", {"bytes": model.memory_bytes}
    engine.close()
    peer = TransformersGenerate(model)
    yield "transformers.generate", {"tokens_per_second": peer.tokens_per_second(128, 128)}
    if device == "cuda":
        static = peer.tokens_per_second(128, 128, cache_implementation="static")
        yield "transformers.generate, static cache and compile", {"tokens_per_second": static}
        yield from _profile(step_runner, model.vocab_size)


def _speed(bare: BareEngine, **options: Any) -> dict[str, Any]:
    return options | asdict(bare.speed(**options))


def _profile(step_runner: Any, vocab_size: int) -> Iterator[tuple[str, Any]]:
    if type(step_runner).__name__ == "CudaStepRunner":
        from benchmarks.gpu.measurement.kernel_profile import step_profile  # needs CUDA

        seconds, shares = step_profile(step_runner, [3 + index % (vocab_size - 3) for index in range(128)])
        yield "profile", {"step_seconds": seconds, "kernels": [asdict(share) for share in shares]}


def service(shape: str, device: str) -> dict[str, Any]:
    """The service's figures, or what it lacks."""
    missing = [name for name in SERVICE_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return {"not run": f"no {', '.join(missing)} here"}
    from benchmarks.gpu.measurement.service import measure  # needs what was just looked for

    speed, first, second = measure(shape, device, new_tokens=128)
    return asdict(speed) | {"first_start_seconds": first, "second_start_seconds": second}


if __name__ == "__main__":
    main()
