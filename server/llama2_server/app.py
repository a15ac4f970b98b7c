"""Build the service and run it: load the model -> warm up -> serve -> drain."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.health import HealthServicer, ReadinessCollector
from llama2_server.api.server import METHODS, Servicers, add_port, health_port, make_interceptor, make_server
from llama2_server.api.text_generation import TextGenerationServicer
from llama2_server.config.settings import Settings
from llama2_server.generation.replicas.shared_replies import SharedReplies
from llama2_server.generation.response_cache import ResponseCache, ResponseCacheCollector
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.idempotency.keyed_replies import IdempotencyOptions
from llama2_server.lifecycle.banner import print_banner
from llama2_server.lifecycle.drain import drain
from llama2_server.lifecycle.model_loading import Load, LoadedModel, load_in_thread, load_model
from llama2_server.lifecycle.preflight import StartupInputs
from llama2_server.lifecycle.readiness import Readiness
from llama2_server.lifecycle.stores import open_ledger, open_quota, open_response_cache, watch_stores
from llama2_server.lifecycle.supervision import EXIT_ENGINE_FAILED, supervised
from llama2_server.lifecycle.tasks import StartupCancelled, background_task, exit_code_on_signals
from llama2_server.lifecycle.warm_up import warm_up_unless_cancelled
from llama2_server.telemetry.guard import guarded
from llama2_server.telemetry.logging import on_loop_exception
from llama2_server.telemetry.telemetry import Telemetry, open_telemetry
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.metrics import LedgerCollector

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of the running service. Only this module knows them all: each part receives what it uses."""

    inputs: StartupInputs
    telemetry: Telemetry
    health: HealthServicer
    ledger: Ledger
    quota: Quota
    response_cache: ResponseCache | None
    loaded: LoadedModel
    readiness: Readiness
    engine: SupervisedEngine
    queue: RequestQueue


async def serve(settings: Settings, inputs: StartupInputs, load: Load = load_model) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain.

    Return the exit code: 0, EXIT_ENGINE_FAILED, or EXIT_SIGNAL + number if a signal arrived before the server served.

    Raises:
        ConfigurationError: the service cannot start with this configuration.
    """
    exit_code = exit_code_on_signals()
    asyncio.get_running_loop().set_exception_handler(on_loop_exception)
    try:
        started = start(settings, inputs, exit_code, load)
        async with started as service, serving(service, settings, exit_code) as address:
            print_banner(address, settings)
            await exit_code
    except StartupCancelled:
        return exit_code.result()
    logger.info("stopped")
    return EXIT_ENGINE_FAILED if exit_code.result() == EXIT_ENGINE_FAILED else 0


@asynccontextmanager
async def start(
    settings: Settings,
    inputs: StartupInputs,
    exit_code: "asyncio.Future[int]",
    load: Load = load_model,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[Service]:
    """Open telemetry (unless given), the health port and the stores, and load the model; close them after the body.

    Raises:
        ConfigurationError: one of them cannot be opened with this configuration.
        StartupCancelled: `exit_code` was set while the model loaded.
    """
    async with AsyncExitStack() as stack:
        inputs.ports.release("--metrics-listen")
        if telemetry is None:
            opening = open_telemetry(settings.metrics_listen, settings.otlp_endpoint, model=inputs.card.name)
            telemetry = await stack.enter_async_context(opening)
        inputs.ports.release("--health-listen")
        health = (await stack.enter_async_context(health_port(settings))).servicer
        ledger = await stack.enter_async_context(open_ledger(settings, inputs))
        quota = await stack.enter_async_context(open_quota(settings, inputs))
        await stack.enter_async_context(watch_stores(quota, ledger, health))
        response_cache = await stack.enter_async_context(open_response_cache(settings, inputs.card))
        loaded = await load_in_thread(load, settings, inputs.card, exit_code)
        readiness = Readiness(health.set_serving, interval_seconds=settings.readiness_probe_interval_seconds)
        metrics = telemetry.metrics
        engine = SupervisedEngine(
            loaded.engine(on_step=guarded(metrics.on_step)),
            engine_step_timeout_seconds=settings.engine_step_timeout_seconds,
            on_outcome=readiness.record_outcome,
        )
        queue = RequestQueue(
            inputs.card.max_concurrent_requests,
            max_queue_size=settings.max_queue_size,
            queue_timeout_seconds=settings.queue_timeout_seconds,
            on_waited=guarded(metrics.queue_time.observe),
        )
        yield Service(inputs, telemetry, health, ledger, quota, response_cache, loaded, readiness, engine, queue)


@asynccontextmanager
async def serving(service: Service, settings: Settings, exit_code: "asyncio.Future[int]") -> AsyncIterator[str]:
    """Warm up, listen and report SERVING for the body, which receives the address; then drain.

    Raises:
        ConfigurationError: the warm-up failed, or the server cannot listen on the address.
        StartupCancelled: `exit_code` was set during the warm-up; a failure of the engine sets it too.
    """
    card, authenticator, loaded = service.inputs.card, service.inputs.authenticator, service.loaded
    health, queue, engine = service.health, service.queue, service.engine
    quota, ledger, cache = service.quota, service.ledger, service.response_cache
    proof = (loaded.fingerprint, service.inputs.receipt_keys)
    options = (IdempotencyOptions.of(settings), SharedReplies.of(settings, loaded.fingerprint))
    text = TextGenerationServicer(
        card, authenticator, loaded.tokenizer, quota, cache, ledger, queue, engine, *proof, *options
    )
    servicers = Servicers.of(text, card, authenticator, quota, ledger, loaded.model, engine.step_kind, *proof)
    interceptor = make_interceptor(settings, service.telemetry, authenticator, card, loaded.tokenizer)
    server = make_server(settings, servicers, health, interceptor, slots=card.max_concurrent_requests)
    stores = (quota, ResponseCacheCollector(cache), LedgerCollector(ledger))
    collectors = (queue, *stores, ReadinessCollector(health), *text.collectors)
    service.telemetry.metrics.register(card.name, loaded.model, engine.step_kind, METHODS, collectors)
    speed = await warm_up_unless_cancelled(engine, loaded, settings, card, exit_code)
    queue.waits.expected_hold_seconds = speed.expected_hold_seconds(card)
    try:
        service.inputs.ports.release("--listen")
        address = add_port(server, settings.listen, service.inputs.certificates)
        await server.start()
        health.set_serving(True)
        supervision = supervised(engine, service.readiness, loaded.tokenizer, queue, health, exit_code)
        async with background_task(authenticator.watch()), supervision:
            yield address
    finally:
        await drain(server, interceptor, health, queue, engine, grace_seconds=settings.shutdown_grace_seconds)
        await text.close()
