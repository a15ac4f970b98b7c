"""Fixtures for all test folders."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import grpc.aio
import hypothesis
import pytest
from tests.support.certificates import Authority
from tests.support.deadlines import CallDeadlines, LoopClock
from tests.support.scripted_model import ScriptedModel, scripted_fingerprint
from tests.support.servers.postgres_server import PostgresCluster, running_postgres
from tests.support.service import Service, ServiceMaker, until, with_config

from llama2.v1 import model_pb2_grpc, text_generation_pb2_grpc
from llama2_server.admission import quota_windows
from llama2_server.admission.accounts import AnonymousAuthenticator, Authenticator
from llama2_server.api.health import HealthServicer
from llama2_server.api.incoming.message_check import Handler
from llama2_server.api.interceptor import CallInterceptor
from llama2_server.app import serving, start
from llama2_server.card import ModelCard, RequestsPerMinute, load_card
from llama2_server.config.settings import Settings
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation import response_cache, supervised_engine
from llama2_server.generation.replicas import leases
from llama2_server.lifecycle import probe
from llama2_server.lifecycle.model_loading import LoadedModel
from llama2_server.lifecycle.preflight import StartupInputs, create_usage_store, read_certificates, read_receipt_keys
from llama2_server.telemetry.telemetry import Telemetry
from llama2_server.usage import database, store


def pytest_configure() -> None:
    """Restore the handlers of SIGINT and SIGHUP, and without a GPU let Triton's interpreter run the kernels.

    Property tests have no deadline, because a busy machine would miss it.

    Shells start background jobs with SIGINT ignored, `nohup` ignores SIGHUP, and programs of tests inherit that. Triton
    reads its variable during its import, which torch causes in some test modules: no single folder can set it in time.
    """
    hypothesis.settings.register_profile("without-deadline", deadline=None)
    hypothesis.settings.load_profile("without-deadline")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not Path("/dev/nvidiactl").exists():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _restore_log_levels() -> Iterator[None]:
    """Restore the levels of the loggers that a start in this process changes: later tests count records."""
    loggers = [logging.getLogger(name) for name in (None, "llama2_server", "asyncio", "alembic", "httpx", "httpx2")]
    levels = [one.level for one in loggers]
    yield
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)


DEMO = Path(str(resources.files("llama2_server") / "demo"))


@pytest.fixture(scope="session")
def demo_card() -> ModelCard:
    """Return the card of the demo model."""
    return load_card("demo")


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    """Return the tokenizer of the demo model."""
    return Tokenizer(DEMO / "tokenizer.model")


@pytest.fixture
def serve_scripted(demo_card: ModelCard, demo_tokenizer: Tokenizer, tmp_path: Path) -> ServiceMaker:
    """Return a function that runs a service whose model always replies with `reply`; other keywords are settings.

    With `ends=False`, the reply never reaches its end of sequence. Without a card, the service has no response cache
    and a practically unlimited quota, so that calls are independent.
    """
    plain_card = with_config(
        demo_card, infer_response_cache=None, max_requests_per_min=RequestsPerMinute(default=10**6)
    )

    @asynccontextmanager
    async def serve(
        reply: str = "Once upon a time.",
        *,
        ends: bool = True,
        card: ModelCard | None = None,
        accounts: Authenticator | None = None,
        failure: Exception | None = None,
        telemetry: Telemetry | None = None,
        fingerprint: Fingerprint | None = None,
        **settings: object,
    ) -> AsyncIterator[Service]:
        card = card or plain_card
        model = scripted_model(demo_tokenizer, card, reply, ends=ends)
        model.failure = failure
        fingerprint = fingerprint or scripted_fingerprint("scripted")
        loaded = LoadedModel(demo_tokenizer, model, frozenset({demo_tokenizer.eos_id}), fingerprint)
        options = Settings.model_validate(
            {
                "listen": "127.0.0.1:0",
                "data_directory": tmp_path,
                "shutdown_grace_seconds": 30,
                **settings,
            }
        )
        authenticator = accounts or AnonymousAuthenticator()
        certificates, receipt_keys = read_certificates(options), read_receipt_keys(options)
        inputs = StartupInputs(card, authenticator, certificates, receipt_keys, create_usage_store(options))
        async with running_service(options, inputs, loaded, model, telemetry) as service:
            yield service

    return serve


def scripted_model(tokenizer: Tokenizer, card: ModelCard, reply: str, *, ends: bool) -> ScriptedModel:
    """Return a model that always replies with `reply`, and then ends the sequence if `ends`."""
    return ScriptedModel(
        tokenizer.encode_raw(reply)[1:] + ([tokenizer.eos_id] if ends else []),
        vocab_size=tokenizer.vocab_size,
        context_length=card.context_length_limit,
        slots=card.max_concurrent_requests,
        probe_ids=tokenizer.encode_chat(probe.PROMPT),
    )


@asynccontextmanager
async def running_service(
    options: Settings, inputs: StartupInputs, loaded: LoadedModel, model: ScriptedModel, telemetry: Telemetry | None
) -> AsyncIterator[Service]:
    """Run the service for the body, and open the model's gate when the drain has started."""
    exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    # The channel outlives the server, so that calls are observed until the drain ends.
    async with (
        AsyncExitStack() as stack,
        start(options, inputs, exit_code, lambda *_: loaded, telemetry) as parts,
        serving(parts, options, exit_code) as address,
    ):
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        model.probes = 0  # without the warm-up
        try:
            yield Service(
                address,
                model,
                channel,
                text_generation_pb2_grpc.TextGenerationServiceStub(channel),
                model_pb2_grpc.ModelServiceStub(channel),
                parts.telemetry.metrics,
            )
        finally:
            # The drain must start first: it rejects queued requests, which a free model would serve.
            opening = asyncio.create_task(open_gate_once_draining(model, parts.health))
            stack.push_async_callback(lambda: opening)


async def open_gate_once_draining(model: ScriptedModel, health: HealthServicer) -> None:
    """Open the model's gate as soon as the server is NOT_SERVING."""
    await until(lambda: not health.serving)
    model.open_gate()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    """Return a clock that controls the timers of the event loop and of the engine's supervision."""
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop.time)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(supervised_engine, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> CallDeadlines:
    """Return the control over the deadlines of all calls on this process's servers."""
    deadlines = CallDeadlines()
    wrap_handler = CallInterceptor._wrap_handler

    def wrap_expiring(
        interceptor: CallInterceptor, method: str, behavior: Handler, account_id: str | None = None
    ) -> Handler:
        return deadlines.wrap(wrap_handler(interceptor, method, behavior, account_id))

    monkeypatch.setattr(CallInterceptor, "_wrap_handler", wrap_expiring)
    return deadlines


@pytest.fixture
def patient_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Redis and PostgreSQL more time for their answers, because a busy machine is slow."""
    monkeypatch.setattr(quota_windows, "STORE_TIMEOUT_SECONDS", 30)
    monkeypatch.setattr(response_cache, "STORE_TIMEOUT_SECONDS", 30)
    monkeypatch.setattr(leases, "STORE_TIMEOUT_SECONDS", 30)
    monkeypatch.setattr(store, "RESERVATION_SECONDS", 120)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 120)
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 120)
    monkeypatch.setitem(database.ENGINE_OPTIONS, "pool_timeout", 120)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    """Return a running PostgreSQL cluster."""
    with running_postgres() as cluster:
        yield cluster


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Return a certificate authority with a new folder."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    return Authority(folder)
