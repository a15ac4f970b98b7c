"""The only place that wires the parts: load -> warm up -> listen -> wait -> drain."""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc.aio

from llama2_server.admission.accounts import ApiKeyAuthenticator, Authenticator
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.health import HealthServicer, ReadinessCollector
from llama2_server.api.interceptor import CallInterceptor
from llama2_server.api.server import METHODS, add_port, health_port, make_server
from llama2_server.api.text_generation import Parts, TextGenerationServicer
from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.engine import Engine
from llama2_server.generation.response_cache import ResponseCacheCollector
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.lifecycle.model_loading import LoadedModel, load
from llama2_server.lifecycle.preflight import read_card_and_accounts
from llama2_server.lifecycle.probe import probe
from llama2_server.lifecycle.readiness import Readiness
from llama2_server.lifecycle.stores import Stores, open_stores
from llama2_server.lifecycle.timeout_checks import warn_if_timeouts_too_short
from llama2_server.telemetry.logging import on_loop_exception
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.telemetry import Telemetry, open_telemetry

logger = logging.getLogger(__name__)

EXIT_ENGINE_FAILED = 70
"""The exit code of a process whose engine hung or died: it has to be started anew."""
EXIT_INTERRUPTED = 130
# A step of a 7B model on a slow CPU takes seconds; one that takes longer than this is not waited for.
ENGINE_STOP_TIMEOUT_SECONDS = 10.0
# What calls have for their last words once nothing is computed for them any more.
STATUS_FLUSH_SECONDS = 2.0
# Calls that are on their way when the drain begins are refused in words for so long: gRPC would just cut them off.
IDLE_WINDOW_SECONDS = 0.05
IDLE_TIMEOUT_SECONDS = 1.0

Result = TypeVar("Result")
Load = Callable[[Settings, ModelCard, Authenticator], LoadedModel]


@dataclass(frozen=True, slots=True)
class Ground:
    """What is there before the weights are."""

    telemetry: Telemetry
    health: HealthServicer
    stores: Stores


class _StartupCancelled(Exception):
    """The end was asked for before the server served."""


async def serve(settings: Settings, load: Load = load) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    Returns:
        The exit code: 0, or EXIT_ENGINE_FAILED.

    Raises:
        ConfigurationError: it cannot be served.
    """
    ending: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    _on_signals(ending)
    asyncio.get_running_loop().set_exception_handler(on_loop_exception)
    card, accounts = read_card_and_accounts(settings)
    async with grounded(settings, card) as ground:
        loading = _in_thread("loading", lambda: load(settings, card, accounts))
        await asyncio.wait((loading, ending), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            logger.info("stopped while loading")
            return ending.result()

        with suppress(_StartupCancelled):
            async with running(settings, loading.result(), ground, ending) as address:
                _say_serving(settings, address)
                await ending
                again = "Ctrl-C or SIGTERM once more ends at once"
                logger.info("draining for up to %.0f s; %s", settings.shutdown_grace_seconds, again)
    logger.info("stopped")
    return ending.result()


@asynccontextmanager
async def grounded(settings: Settings, card: ModelCard, telemetry: Telemetry | None = None) -> AsyncIterator[Ground]:
    """Telemetry, unless there is one, the health port and the stores, for the body of the `async with`.

    Raises:
        LedgerError: the ledger cannot be opened as it is configured.
        TelemetryError: metrics or traces cannot be had as they are configured.
        ConfigurationError: the health port cannot be listened on, or there is no Redis by that URL.
    """
    async with AsyncExitStack() as stack:
        if telemetry is None:
            ends = open_telemetry(settings.metrics_listen, settings.otlp_endpoint, model=card.name)
            telemetry = await stack.enter_async_context(ends)
        health = (await stack.enter_async_context(health_port(settings))).servicer
        yield Ground(telemetry, health, await open_stores(settings, card, stack))


@asynccontextmanager
async def running(
    settings: Settings, loaded: LoadedModel, ground: Ground, ending: "asyncio.Future[int] | None" = None
) -> AsyncIterator[str]:
    """Warm up, listen and be SERVING for the body of the `async with`, which gets the address; then drain.

    `ending` gets the exit code when the engine is lost; where it has one during the warm-up, that is given up.

    Raises:
        _StartupCancelled: it was.
        ConfigurationError: the warm-up failed, or the address cannot be listened on.
        CertificateError: the certificate's files cannot be used.
    """
    metrics, health = ground.telemetry.metrics, ground.health
    ending = ending or asyncio.get_running_loop().create_future()
    async with AsyncExitStack() as stack:
        if isinstance(loaded.accounts, ApiKeyAuthenticator):
            await stack.enter_async_context(_beside(loaded.accounts.watch()))
        engine = SupervisedEngine(
            Engine(loaded.model, loaded.eos_ids, on_step=metrics.on_step, step_runner=loaded.step_runner),
            engine_step_timeout_seconds=settings.engine_step_timeout_seconds,
            on_outcome=lambda worked: readiness.heard(worked),  # noqa: PLW0108 - it is made below
        )
        parts = _parts(settings, loaded, ground.stores, engine, metrics)
        readiness = Readiness(
            health.set_serving,
            lambda: probe(engine, loaded.tokenizer),
            idle=lambda: parts.slots.running == 0,
            interval_seconds=settings.readiness_probe_interval_seconds,
        )
        servicer, interceptor = TextGenerationServicer(parts), CallInterceptor(ground.telemetry)
        server = make_server(settings, parts, servicer, health, interceptor)
        cache = ResponseCacheCollector(parts.cache)
        for part in (parts.slots, parts.quota, cache, parts.ledger, ReadinessCollector(health)):
            metrics.registry.register(part)
        metrics.register_model(loaded.card.name, loaded.model)
        metrics.preregister_methods(METHODS)
        try:
            await _unless(ending, _warm_up(settings, parts, loaded.model.prefill_chunk_tokens))
            address = add_port(server, settings)
            await server.start()
            health.set_serving(True)
            async with _beside(readiness.keep()), _beside(_watch(parts, health, ending)):
                yield address
        finally:
            await _drain(settings, parts, health, server, interceptor)
            await servicer.close()


def _parts(
    settings: Settings, loaded: LoadedModel, stores: Stores, engine: SupervisedEngine, metrics: Metrics
) -> Parts:
    slots = RequestQueue(
        loaded.card.max_concurrent_requests,
        max_queue_size=settings.max_queue_size,
        queue_timeout_seconds=settings.queue_timeout_seconds,
        on_waited=metrics.queue_time.observe,
    )
    return Parts(
        loaded.card,
        loaded.accounts,
        loaded.tokenizer,
        stores.quota,
        stores.cache,
        stores.ledger,
        slots,
        engine,
        loaded.fingerprint,
    )


async def _warm_up(settings: Settings, parts: Parts, chunk_tokens: int) -> None:
    """Generate, so that the first caller does not wait for the first use of anything; then tell how fast it is."""
    for _ in range(2):  # the first pays for what is used for the first time, and tells nothing of the speed
        generation = await probe(parts.engine, parts.tokenizer, max_tokens=2)
        if generation.failed:
            raise ConfigurationError("the model cannot generate; the log above says why")
    prefill_seconds = (generation.first_token_at - generation.admitted_at) / generation.counts.input_tokens
    decode_seconds = generation.finished_at - generation.first_token_at
    warn_if_timeouts_too_short(
        settings,
        parts.card,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        chunk_tokens=chunk_tokens,
    )


async def _watch(parts: Parts, health: HealthServicer, ending: "asyncio.Future[int]") -> None:
    """When the engine is lost, refuse who waits and who comes, and have the process end."""
    await parts.engine.watch()
    health.close()
    parts.slots.close()
    if not ending.done():
        ending.set_result(EXIT_ENGINE_FAILED)


async def _drain(
    settings: Settings, parts: Parts, health: HealthServicer, server: grpc.aio.Server, interceptor: CallInterceptor
) -> None:
    # Tell balancers first.
    health.close()
    # Refuse those who wait, and in words those who are on their way: `stop` cuts calls off that it has not seen.
    parts.slots.close()
    await _quiet(interceptor)
    # Say GOAWAY, and let running calls finish.
    shutdown_grace_seconds = 0.0 if parts.engine.lost else settings.shutdown_grace_seconds
    stopping = asyncio.create_task(
        server.stop(shutdown_grace_seconds + ENGINE_STOP_TIMEOUT_SECONDS + STATUS_FLUSH_SECONDS)
    )
    await asyncio.wait([stopping], timeout=shutdown_grace_seconds)
    # End those who took too long with a status that says so; what was computed is recorded.
    await parts.engine.close(ENGINE_STOP_TIMEOUT_SECONDS)
    await asyncio.wait([stopping], timeout=STATUS_FLUSH_SECONDS)
    await server.stop(None)
    await stopping


async def _quiet(interceptor: CallInterceptor) -> None:
    """Wait until no calls come any more."""
    with suppress(TimeoutError):
        async with asyncio.timeout(IDLE_TIMEOUT_SECONDS):
            seen = -1
            while seen != interceptor.calls:
                seen = interceptor.calls
                await asyncio.sleep(IDLE_WINDOW_SECONDS)


async def _unless(ending: "asyncio.Future[int]", work: Awaitable[None]) -> None:
    """Do the work; raises _StartupCancelled, and gives the work up, if the end comes first."""
    async with _beside(work) as task:
        await asyncio.wait((task, ending), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _StartupCancelled
        task.result()


@asynccontextmanager
async def _beside(work: Awaitable[None]) -> AsyncIterator["asyncio.Future[None]"]:
    """Work that goes on beside the body, and ends with it."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _in_thread(name: str, work: Callable[[], Result]) -> "asyncio.Future[Result]":
    """Work on a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # raised again where the future is awaited
            loop.call_soon_threadsafe(future.set_exception, error)
        else:
            loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _on_signals(ending: "asyncio.Future[int]") -> None:
    def on_signal() -> None:
        if ending.done():
            os._exit(EXIT_INTERRUPTED)
        ending.set_result(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


def _say_serving(settings: Settings, address: str) -> None:
    prompt = "Tell me a story about a fox who lives by the sea."
    method = "llama2.v1.TextGenerationService/GenerateStream"
    body = f'{{"prompt": "{prompt}"}}'
    here = "" if address == "127.0.0.1:50051" else f"--address {address} "
    plain = "-plaintext "
    if settings.tls_certificate is not None:
        here, plain = f"{here}--ca CA.pem ", "-cacert CA.pem "
    command = Path(sys.executable).parent / "llama2"
    llama2 = os.path.relpath(command) if command.is_relative_to(Path.cwd()) else command.name
    print(
        f"SERVING on {address}. Ctrl-C stops. In another terminal, try:\n\n"
        f'  {llama2} {here}generate "{prompt}"\n'
        f"  {llama2} {here}chat\n"
        f"  grpcurl {plain}-d '{body}' {address} {method}\n",
        flush=True,
    )
