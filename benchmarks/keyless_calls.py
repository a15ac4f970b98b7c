"""Measure what idempotency keys add to a call without a key: the server's CPU time per call, as a ratio.

One server process alternates between this build and a bypass: the same code, without the idempotency layer on the path
of the call. Pairs of blocks alternate in one run, so that both meet the same disturbances. Each pair has a ratio.
Run `python -m benchmarks.keyless_calls`; it serves the demo model in another process.
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.measurement.overload import running
from benchmarks.results import processor
from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.accounts import AnonymousAuthenticator
from llama2_server.api.text_generation import TextGenerationServicer
from llama2_server.api.validation import rules
from llama2_server.app import serve
from llama2_server.card import RequestsPerMinute, load_card
from llama2_server.config.settings import Settings
from llama2_server.lifecycle.preflight import StartupInputs
from llama2_server.telemetry import logging

MODULE = "benchmarks.keyless_calls"
BLOCK = 40
"""Calls of each kind in a pair."""
PAIRS = 100
LAYER_CALLS = 10_000
REQUEST = pb.GenerateRequest(prompt="Tell me a story.", max_tokens=4)
STREAM, SOURCE, RULES = "GenerateStream", "_source", "_idempotency_violations"
TextStub = Any  # generated stubs have no type at run time


def _serve(folder: Path) -> None:
    """Serve the demo model; SIGUSR1 removes the idempotency layer from the path of a call, SIGUSR2 returns it."""
    listed = load_card("demo").constellation_config.model_copy(
        update={"max_requests_per_min": RequestsPerMinute(default=10**9), "infer_response_cache": None}
    )
    card = load_card("demo").model_copy(update={"constellation_config": listed})
    settings = Settings.model_validate({"listen": "127.0.0.1:0", "data_directory": folder})
    logging.configure("warning", "json")
    shipped: dict[str, Callable[..., Any]] = {
        STREAM: TextGenerationServicer.GenerateStream,
        SOURCE: TextGenerationServicer._source,
        RULES: rules._idempotency_violations,
    }
    bypass: dict[str, Callable[..., Any]] = {STREAM: _stream, SOURCE: _source, RULES: _no_violations}
    stream: list[Callable[..., Any]] = []

    def use(parts: dict[str, Callable[..., Any]]) -> None:
        stream[:] = [parts[STREAM]]
        setattr(TextGenerationServicer, SOURCE, parts[SOURCE])
        setattr(rules, RULES, parts[RULES])

    async def dispatch(self: Any, request: pb.GenerateRequest, context: Any) -> None:  # gRPC keeps the method it gets
        await stream[0](self, request, context)

    use(shipped)
    setattr(TextGenerationServicer, STREAM, dispatch)
    signal.signal(signal.SIGUSR1, lambda *_: use(bypass))
    signal.signal(signal.SIGUSR2, lambda *_: use(shipped))
    asyncio.run(serve(settings, StartupInputs(card, AnonymousAuthenticator(), None)))


def _source(self: Any, call: Any, request: Any, reply_request: Any, cache_key: Any) -> Any:
    return self._replies.reply(call, reply_request)


async def _stream(self: Any, request: pb.GenerateRequest, context: Any) -> None:
    async with self.serve(request, context, streaming=True) as reply:
        await self._send(request, context, reply, pb.GenerateStreamResponse())


def _no_violations(*_: object, **__: object) -> Iterator[Any]:
    return iter(())


def layer_microseconds() -> float:
    """Return the time of the layer's code on the path of a call without a key: its rules, and its two conditions."""

    def run() -> bool:
        violations = [*rules._idempotency_violations(REQUEST, streaming=True)]
        return bool(violations or REQUEST.resume_after_characters or REQUEST.HasField("idempotency_key"))

    return min(timeit.repeat(run, number=LAYER_CALLS, repeat=20)) / LAYER_CALLS * 1e6


async def block_seconds(stub: TextStub, pid: int, number: signal.Signals) -> float:
    """Return the server's CPU time of one block of calls."""
    os.kill(pid, number)
    await _call(stub)  # the handler of the signal runs before the next block
    clock = (~pid << 3) | 2  # Linux: the CPU-time clock of a process
    before = time.clock_gettime(clock)
    for _ in range(BLOCK):
        await _call(stub)
    return time.clock_gettime(clock) - before


async def _call(stub: TextStub) -> None:
    async for _ in stub.GenerateStream(REQUEST):
        pass


async def measure(pairs: int, address: str, pid: int) -> None:
    """Print the CPU time per call, and the median ratio of the pairs with its 95% interval by order statistics."""
    build, ratios = [], []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        for pair in range(pairs + 2):
            order = [signal.SIGUSR1, signal.SIGUSR2]
            if pair % 2:
                order.reverse()
            seconds = {number: await block_seconds(stub, pid, number) for number in order}
            if pair >= 2:  # the first pairs warm up
                build.append(seconds[signal.SIGUSR2] / BLOCK)
                ratios.append(seconds[signal.SIGUSR2] / seconds[signal.SIGUSR1])
    ratios.sort()
    spread = round(0.98 * len(ratios) ** 0.5)
    low, high = ratios[len(ratios) // 2 - spread], ratios[min(len(ratios) - 1, len(ratios) // 2 + spread)]
    print(
        f"{pairs} pairs of {BLOCK} calls without a key: {1000 * statistics.median(build):.2f} ms of CPU time per call; "
        f"ratio to the bypass {statistics.median(ratios):.4f} (95% interval {low:.4f} to {high:.4f})"
    )


def main() -> None:
    """Measure, or serve in the other process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="number of pairs of blocks")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        _serve(arguments.serve)
        return
    print(processor())
    print(f"the layer's own code takes {layer_microseconds():.2f} microseconds per call without a key")
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", MODULE, "--serve", name]
        with running(command) as (pid, address):
            asyncio.run(measure(arguments.pairs, address, pid))


if __name__ == "__main__":
    main()
