"""Measure the server's cost of overload: an arrival in a long queue, and a call that is rejected.

Run it with `python -m benchmarks.measurement.overload`; it serves the demo model in another process.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.request_queue import RequestQueue

WAITING = 10_000
ARRIVALS = 1_000
REJECTIONS = 4_000
CONCURRENT_CALLS = 100
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


async def arrival_microseconds() -> float:
    """Return the mean CPU time in which a request enters a queue of 10,000, each of another account, and leaves it."""
    queue = RequestQueue(1, max_queue_size=2 * WAITING, queue_timeout_seconds=10**9)
    for index in range(WAITING):
        queue.enter(f"account{index % (WAITING // 2)}", None)
    deadline = asyncio.get_running_loop().time() + 10**6
    started_at = time.process_time()
    for index in range(ARRIVALS):
        queue.release(queue.enter(f"account{index}", deadline))
    return (time.process_time() - started_at) / ARRIVALS * 1e6


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[tuple[int, str]]:
    """Serve the demo model without a queue, with an unlimited quota; yield the process id and the address."""
    card = folder / "card.yaml"
    source = Path(__file__).parents[2] / "server" / "llama2_server" / "cards" / "demo.yaml"
    card.write_text(source.read_text().replace("anonymous: 600", "anonymous: 100000000"))
    weights = source.parents[1] / "demo"
    flags = ["--listen", "127.0.0.1:0", "--max-queue-size", "0", "--card", str(card), "--weights", str(weights)]
    command = [sys.executable, "-m", "llama2_server", *flags, "--data-directory", str(folder), "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        address = next(line.split()[2].rstrip(".") for line in process.stdout if line.startswith("SERVING on "))
        try:
            yield process.pid, address
        finally:
            process.terminate()


def _cpu_seconds_by_thread(pid: int) -> dict[str, float]:
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            seconds[task.name] = (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
    return seconds


async def rejection_milliseconds(pid: int, address: str) -> float:
    """Return the server's CPU time per rejected call, without the threads that generate for the call in the slot."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        holding = asyncio.create_task(_hold_slot(stub))
        before = _cpu_seconds_by_thread(pid)
        await asyncio.sleep(2)
        alone = _cpu_seconds_by_thread(pid)
        generating = {thread for thread, seconds in alone.items() if seconds - before.get(thread, 0.0) > 0.5}
        started_at = time.perf_counter()
        rejected = sum(await asyncio.gather(*(_flood(stub, number) for number in range(CONCURRENT_CALLS))))
        seconds = time.perf_counter() - started_at
        after = _cpu_seconds_by_thread(pid)
        holding.cancel()
    others = sum(cpu - alone.get(thread, 0.0) for thread, cpu in after.items() if thread not in generating)
    print(f"{rejected} rejections in {seconds:.1f} s; threads that generate: {len(generating)}")
    return others / rejected * 1e3


async def _hold_slot(stub: "text_generation_pb2_grpc.TextGenerationServiceAsyncStub") -> None:
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Generate(pb.GenerateRequest(prompt="Tell me a story.", max_tokens=700, no_cache=True))


async def _flood(stub: "text_generation_pb2_grpc.TextGenerationServiceAsyncStub", number: int) -> int:
    """Make this caller's share of the calls; return how many were rejected."""
    rejected = 0
    for call in range(REJECTIONS // CONCURRENT_CALLS):
        try:
            await stub.Generate(pb.GenerateRequest(prompt=f"caller {number}, call {call}", max_tokens=1))
        except grpc.aio.AioRpcError as error:
            rejected += error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return rejected


def main() -> None:
    """Print both figures."""
    print(f"arrival with {WAITING} waiting: {asyncio.run(arrival_microseconds()):.0f} us (goal: at most 50)")
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as (pid, address):
        milliseconds = asyncio.run(rejection_milliseconds(pid, address))
    print(f"rejected call: {milliseconds:.2f} ms of the server's CPU time (goal: at most 1)")


if __name__ == "__main__":
    main()
