"""Watch the engine while the server serves, and end the process when the engine has failed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.health import HealthServicer
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.lifecycle.probe import probe_succeeds
from llama2_server.lifecycle.readiness import MAX_FAILED_PROBES, Readiness
from llama2_server.lifecycle.tasks import background_task

EXIT_ENGINE_FAILED = 70
"""Exit code of a process whose engine has failed; restart the process."""


@asynccontextmanager
async def supervised(
    engine: SupervisedEngine,
    readiness: Readiness,
    tokenizer: Tokenizer,
    queue: RequestQueue,
    health: HealthServicer,
    exit_code: "asyncio.Future[int]",
) -> AsyncIterator[None]:
    """Probe the engine during the body; when it has failed, reject queued and new calls, and set `exit_code`."""
    probing = _fail_when_probes_fail(engine, readiness, tokenizer, queue)
    async with background_task(probing), background_task(_stop_when_failed(engine, health, queue, exit_code)):
        yield


async def _stop_when_failed(
    engine: SupervisedEngine, health: HealthServicer, queue: RequestQueue, exit_code: "asyncio.Future[int]"
) -> None:
    await engine.wait_until_failed()
    health.close()
    queue.close()
    if not exit_code.done():
        exit_code.set_result(EXIT_ENGINE_FAILED)


async def _fail_when_probes_fail(
    engine: SupervisedEngine, readiness: Readiness, tokenizer: Tokenizer, queue: RequestQueue
) -> None:
    """Probe until probes fail in a row; then declare that the engine has failed."""
    await readiness.run(lambda: probe_succeeds(engine, tokenizer), idle=lambda: queue.running == 0)
    engine.fail(f"{MAX_FAILED_PROBES} probes in a row failed")
