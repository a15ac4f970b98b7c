"""One scene: a fault on real processes, and the promises that must hold during and after it."""

import asyncio
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from tests.reliability.chaos.history import History, broken_totals, read_records
from tests.support.forks import ForkedServer, Forks
from tests.support.service import health_stub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HEALTH_SECONDS = 20
"""Time within which the health service must report a change."""
LIMIT_SECONDS = 900
"""Time after which most scenes count as hung."""


@dataclass
class Scene:
    """The parts that a scene uses, and its results."""

    forks: Forks
    folder: Path
    draw: random.Random
    figures: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Broken promises."""
    skipped: str = ""
    """The reason why it did not run."""
    seconds: float = 0.0

    def check(self, holds: bool, promise: str) -> None:
        """Note a promise that does not hold."""
        if not holds:
            self.broken.append(promise)

    async def start(self, data_directory: Path, *flags: str) -> ForkedServer:
        """Start a server."""
        return await asyncio.to_thread(self.forks.start, data_directory, *flags)

    async def stop(self, server: ForkedServer) -> None:
        """Stop a server by SIGTERM: it must drain and exit with 0."""
        code = await asyncio.to_thread(server.stop)
        self.check(code == 0, f"the server exited with {code} after SIGTERM")

    def check_records(self, data_directory: Path, history: History) -> None:
        """Compare the records of a data directory with what the clients saw, after the server has ended."""
        self.broken.extend(history.broken_promises(read_records(data_directory)))
        self.broken.extend(broken_totals(data_directory))

    def check_statuses(self, history: History, *allowed: str) -> None:
        """Check that calls failed only with these reasons, each of them with details."""
        for failure, count in history.failures.items():
            self.check(failure in allowed, f"{count} calls failed with {failure}")

    async def health(self, channel: grpc.aio.Channel, expected: int, name: str = "") -> None:
        """Wait until the health service reports this state."""
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                async for response in watch:
                    if response.status == expected:
                        return
        except TimeoutError:
            state = health_pb2.HealthCheckResponse.ServingStatus.Name(expected)
            self.broken.append(f"health of {name or 'the server'} is not {state} after {HEALTH_SECONDS} s")
        finally:
            watch.cancel()


Play = Callable[[Scene], Awaitable[Any]]


async def play(forks: Forks, folder: Path, seed: str, scene: Play, limit_seconds: float) -> Scene:
    """Play a scene with the random numbers of a seed, and return its results; it fails after the time limit."""
    played = Scene(forks, folder, random.Random(seed))
    folder.mkdir()
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(limit_seconds):
            await scene(played)
    except pytest.skip.Exception as skipped:
        played.skipped = str(skipped)
    except Exception as error:  # an error in one scene must not end the others
        played.broken.append("the scene failed:\n" + "".join(traceback.format_exception(error)))
    played.seconds = time.monotonic() - started_at
    return played


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
