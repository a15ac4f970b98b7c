"""Measure what calls that generate nothing cost the server: CPU per rejected request, the time for which one holds the
event loop, and health checks in a flood.

Run it with `python -m benchmarks.measurement.unpaid`; it serves the demo model in another process, without a limit of
such calls.
"""

import asyncio
import itertools
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.measurement.overload import HOLDS, cpu_seconds, running_server
from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc

CALLERS = 4
FLOOD_SECONDS = 10.0
CHECK_INTERVAL_SECONDS = 0.02
CALLS_PER_KIND = 200

TURN = [pb.ChatMessage(role="user", content="a"), pb.ChatMessage(role="assistant", content="b")]
LONG = [pb.ChatMessage(role="user", content="hello there " * 300)]
REJECTED = {
    "1,023 empty messages": pb.GenerateRequest(messages=[pb.ChatMessage()] * 1023),
    "150 empty messages": pb.GenerateRequest(messages=[pb.ChatMessage()] * 150),
    "invalid message after 150 valid ones": pb.GenerateRequest(messages=[*TURN * 75, pb.ChatMessage()]),
    "conversation beyond the context": pb.GenerateRequest(messages=[*LONG, TURN[1]] * 3 + LONG),
    "150 messages beyond the context": pb.GenerateRequest(
        messages=[*TURN * 75, pb.ChatMessage(role="user", content="a " * 1500)]
    ),
    "100,000 stop sequences": pb.GenerateRequest(prompt="a", stop=["a"] * 100_000),
    "prompt of 100,000 characters": pb.GenerateRequest(prompt="a" * 100_000),
    "one wrong parameter": pb.GenerateRequest(prompt="a", top_p=2),
}
"""Requests for the demo card, each at a bound of the validation; all are INVALID_ARGUMENT."""

TextStub = Any  # generated stubs have no type at run time


async def rejected(stub: TextStub, request: pb.GenerateRequest) -> None:
    """Make a call that must be rejected as invalid."""
    try:
        await stub.Generate(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return
        raise
    raise RuntimeError("the call was not rejected")


async def milliseconds_per_kind(stub: TextStub, pid: int) -> list[tuple[str, float]]:
    """Return the server's CPU time per call, by the kind of rejected request."""
    figures = []
    for name, request in REJECTED.items():
        await rejected(stub, request)
        before = cpu_seconds(pid)
        for _ in range(CALLS_PER_KIND):
            await rejected(stub, request)
        figures.append((name, (cpu_seconds(pid) - before) / CALLS_PER_KIND * 1e3))
    return figures


async def flood(stub: TextStub, until: float) -> int:
    """Make rejected calls of all kinds, one after another; return their number."""
    for number, request in enumerate(itertools.cycle(REJECTED.values())):
        if time.perf_counter() > until:
            return number
        await rejected(stub, request)
    raise AssertionError("the cycle is endless")


async def health_milliseconds(address: str, until: float) -> list[float]:
    """Return the durations of health checks on a separate connection."""
    durations = []
    async with grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        while time.perf_counter() < until:
            started_at = time.perf_counter()
            await health.Check(health_pb2.HealthCheckRequest())
            durations.append((time.perf_counter() - started_at) * 1e3)
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)
    return durations


async def measure(pid: int, address: str) -> None:
    """Print the figures of one server."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        for name, milliseconds in await milliseconds_per_kind(stub, pid):
            print(f"{name}: {milliseconds:.2f} ms of the server's CPU time (goal: at most 5)")
        for callers in (0, CALLERS):
            until = time.perf_counter() + FLOOD_SECONDS
            calls = [flood(stub, until) for _ in range(callers)]
            checks = asyncio.create_task(health_milliseconds(address, until))
            rate = sum(await asyncio.gather(*calls)) / FLOOD_SECONDS
            durations = await checks
            p99 = statistics.quantiles(durations, n=100)[98]
            print(f"{callers} callers, {rate:.0f} rejected calls per second: health p99 {p99:.1f} ms (goal: under 50)")


async def reject_often(pid: int, address: str, name: str) -> None:
    """Let a server reject requests of one kind; its longest hold of the loop is that of these calls."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        await rejected(stub, REJECTED[name])
        os.kill(pid, signal.SIGUSR1)
        for _ in range(CALLS_PER_KIND):
            await rejected(stub, REJECTED[name])


def measure_holds(pid: int, address: str, file: Path) -> None:
    """Print the longest CPU time of one callback of a server's event loop, by the kind of rejected request."""
    for name in REJECTED:
        asyncio.run(reject_often(pid, address, name))
        print(f"{name}: holds the event loop for at most {float(file.read_text()):.2f} ms (goal: 5)")


def main() -> None:
    """Print all figures."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / HOLDS
        file.touch()  # in a dedicated server: the measurement makes each callback slower
        with running_server(Path(name)) as (pid, address):
            measure_holds(pid, address, file)
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as (pid, address):
        asyncio.run(measure(pid, address))


if __name__ == "__main__":
    main()
