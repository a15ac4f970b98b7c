"""Stop serving: reject new calls, let running calls finish within the grace period, then end the engine."""

import asyncio
import logging
from contextlib import suppress

import grpc.aio

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.health import HealthServicer
from llama2_server.api.interceptor import CallInterceptor
from llama2_server.generation.supervised_engine import SupervisedEngine

logger = logging.getLogger(__name__)

# One decode step of a 7B model on a slow CPU takes seconds. The drain does not wait longer than this for a step.
ENGINE_STOP_TIMEOUT_SECONDS = 10.0
# Time for calls to send their status after the engine has stopped.
STATUS_FLUSH_SECONDS = 2.0
# `server.stop` cuts calls that have not reached a handler yet. The drain first waits until no call has arrived for one
# window, so that each of them is rejected with a status.
IDLE_WINDOW_SECONDS = 0.05
IDLE_TIMEOUT_SECONDS = 1.0


async def drain(
    server: grpc.aio.Server,
    interceptor: CallInterceptor,
    health: HealthServicer,
    queue: RequestQueue,
    engine: SupervisedEngine,
    *,
    grace_seconds: float,
) -> None:
    """Stop the server gracefully; running calls have `grace_seconds` to finish."""
    logger.info("draining for up to %.0f s; a second signal exits at once", grace_seconds)
    # Load balancers must see NOT_SERVING before connections close.
    health.close()
    queue.close()
    await _wait_until_idle(interceptor)
    # `stop` sends GOAWAY and lets running calls finish. Its own timeout covers the two phases after the grace period.
    grace_seconds = 0.0 if engine.failed else grace_seconds
    stopping = asyncio.create_task(server.stop(grace_seconds + ENGINE_STOP_TIMEOUT_SECONDS + STATUS_FLUSH_SECONDS))
    await asyncio.wait([stopping], timeout=grace_seconds)
    # Calls that still run end with a status that says why; their tokens are recorded.
    await engine.close(ENGINE_STOP_TIMEOUT_SECONDS)
    await asyncio.wait([stopping], timeout=STATUS_FLUSH_SECONDS)
    await server.stop(None)
    await stopping


async def _wait_until_idle(interceptor: CallInterceptor) -> None:
    """Wait until no call has arrived for one window."""
    with suppress(TimeoutError):
        async with asyncio.timeout(IDLE_TIMEOUT_SECONDS):
            seen = -1
            while seen != interceptor.calls:
                seen = interceptor.calls
                await asyncio.sleep(IDLE_WINDOW_SECONDS)
