"""Measure the server's cost of overload: an arrival in a long queue, and a call that is rejected.

Run it with `python -m benchmarks.measurement.overload`; it serves the demo model in another process.
"""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import grpc
import grpc.aio
from torch import Tensor

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.accounts import AnonymousAuthenticator, ApiKeyAuthenticator
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.app import serve
from llama2_server.card import ModelCard, RequestsPerMinute, load_card
from llama2_server.config.settings import Settings
from llama2_server.lifecycle.model_loading import LoadedModel, load_model
from llama2_server.lifecycle.preflight import StartupInputs
from llama2_server.telemetry import logging

WAITING = 10_000
ARRIVALS = 1_000
REJECTIONS = 4_000
CONCURRENT_CALLS = 50  # below the streams that the server allows on a connection
HOLD = "hold"  # a file: while it exists, the next generation holds the slot and uses no CPU
HOLDS = "holds"  # a file: if it exists at the start, the server writes the longest hold of its event loop to it
KEYS = "keys.yaml"  # a file: if it exists at the start, calls need one of its API keys
MODULE = "benchmarks.measurement.overload"
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


def running_server(folder: Path, log: int | IO[str] = subprocess.DEVNULL) -> AbstractContextManager[tuple[int, str]]:
    """Serve in another process, with an unlimited quota, for the body; return the process id and the address."""
    return running([sys.executable, "-m", MODULE, "--serve", str(folder)], log)


@contextlib.contextmanager
def running(command: Sequence[str], log: int | IO[str] = subprocess.DEVNULL) -> Iterator[tuple[int, str]]:
    """Run the command of a server for the body; yield the process id and the address."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        address = next(line.split()[2].rstrip(".") for line in process.stdout if line.startswith("SERVING on "))
        try:
            yield process.pid, address
        finally:
            process.kill()


def record_loop_holds(path: Path) -> None:
    """Write the longest CPU time of one callback of the event loop since the last SIGUSR1, in ms, to a file.

    Only the CPU time of the loop's thread counts: other processes do not change it.
    """
    longest, run = [0.0], asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        started_at = time.thread_time()
        run(handle)
        milliseconds = (time.thread_time() - started_at) * 1e3
        if milliseconds > longest[0]:
            longest[0] = milliseconds
            path.write_text(f"{milliseconds:.3f}")

    def reset(*_: object) -> None:
        longest[0] = 0.0
        path.write_text("0")

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
    signal.signal(signal.SIGUSR1, reset)


def _serve(folder: Path) -> None:
    """Serve the demo model without a queue and with an unlimited quota; record the holds of the loop if asked."""
    if (folder / HOLDS).exists():
        record_loop_holds(folder / HOLDS)
    listed = load_card("demo").constellation_config.model_copy(
        update={"max_requests_per_min": RequestsPerMinute(default=10**9), "infer_response_cache": None}
    )
    card = load_card("demo").model_copy(update={"constellation_config": listed})
    options = {
        "listen": "127.0.0.1:0",
        "max_queue_size": 0,
        "max_free_calls_per_minute": 10**9,
        "data_directory": folder,
        "cpu_kernels": "torch",
    }
    settings = Settings.model_validate(options)
    logging.configure("info", "json")

    def load(settings: Settings, card: ModelCard) -> LoadedModel:
        loaded = load_model(settings, card)
        prefill = loaded.model.prefill

        def blocking_prefill(slot: int, token_ids: list[int], position: int) -> Tensor:
            if (folder / HOLD).exists():
                threading.Event().wait()
            return prefill(slot, token_ids, position)

        loaded.model.prefill = blocking_prefill  # type: ignore[method-assign]
        return loaded

    keys = folder / KEYS
    authenticator = ApiKeyAuthenticator(keys) if keys.exists() else AnonymousAuthenticator()
    gc.freeze()  # as `llama2-server` does after its imports
    asyncio.run(serve(settings, StartupInputs(card, authenticator, None), load))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


async def rejection_milliseconds(folder: Path, pid: int, address: str) -> float:
    """Return the server's CPU time per rejected call, while another call holds the slot."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        (folder / HOLD).touch()
        holding = asyncio.create_task(_hold_slot(stub))
        await asyncio.sleep(2)
        before, started_at = cpu_seconds(pid), time.perf_counter()
        rejected = sum(await asyncio.gather(*(_flood(stub, number) for number in range(CONCURRENT_CALLS))))
        seconds, used_seconds = time.perf_counter() - started_at, cpu_seconds(pid) - before
        holding.cancel()
    print(f"{rejected} of {REJECTIONS} calls were rejected in {seconds:.1f} s")
    return used_seconds / rejected * 1e3


async def _hold_slot(stub: "text_generation_pb2_grpc.TextGenerationServiceAsyncStub") -> None:
    await stub.Generate(pb.GenerateRequest(prompt="a story"))


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
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as (pid, address):
        milliseconds = asyncio.run(rejection_milliseconds(Path(folder), pid, address))
    print(f"rejected call: {milliseconds:.2f} ms of the server's CPU time (goal: at most 1)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(Path(sys.argv[2]))
    else:
        main()
