"""Run the comparison against this repository's server, behind its Envoy example."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from conformance.equivalence.oracle import Oracle
from conformance.equivalence.run import run_equivalence
from conformance.server_runner.target import Keys, Target
from conformance.service.launch import CARD, running_envoy, running_service

PROGRESS = 10_000
LEAST = 100
"""The smallest number of differences of each exception that proves it, with `ENOUGH_BODIES` or more."""
ENOUGH_BODIES = 20_000
FLAGS = ("--max-queue-size", "64", "--max-free-calls-per-minute", str(10**9))


async def compare(bodies: int, seed: int, json_share: int, on_line: Callable[[str], None]) -> list[str]:
    """Start the server, send the bodies, and return each problem in words; `on_line` is called with each line."""
    started = time.monotonic()

    def on_count(number: int) -> None:
        if number and number % PROGRESS == 0:
            on_line(f"{number} bodies, {number / (time.monotonic() - started):.0f} per second")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            running_service(folder, *FLAGS) as service,
            running_envoy(folder, service.address) as url,
        ):
            target = Target.connect(service.address, Keys.read(service.keys_file, None), url)
            oracle = Oracle(CARD, folder / "checkpoint/tokenizer.model")
            try:
                tally = await run_equivalence(
                    target, oracle, bodies=bodies, seed=seed, json_share=json_share, on_count=on_count
                )
            finally:
                await target.close()
    on_line(tally.table())
    least = LEAST if bodies >= ENOUGH_BODIES else 0
    return [*tally.problems, *tally.missing("gRPC", least)]
