"""Fixtures that several test modules share."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import resources
from pathlib import Path

import grpc.aio
import pytest
from tests.support.certificates import Authority
from tests.support.postgres_server import PostgresCluster, running_postgres
from tests.support.scripted_model import ScriptedModel
from tests.support.service import Service, ServiceMaker, until, with_config

from llama2.v1 import model_pb2_grpc, text_generation_pb2_grpc
from llama2_server.admission.accounts import AnonymousAuthenticator, Authenticator
from llama2_server.api.health import HealthServicer
from llama2_server.app import serving, start
from llama2_server.card import ModelCard, RequestsPerMinute, load_card
from llama2_server.config.settings import Settings
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.lifecycle import probe
from llama2_server.lifecycle.model_loading import LoadedModel
from llama2_server.lifecycle.preflight import StartupInputs, create_usage_store, read_certificates
from llama2_server.telemetry.telemetry import Telemetry


def pytest_configure() -> None:
    """Undo what a shell does to its background jobs: they ignore SIGINT, and so would each program that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


DEMO = Path(str(resources.files("llama2_server") / "demo"))


@pytest.fixture(scope="session")
def demo_card() -> ModelCard:
    """The card of the demo model."""
    return load_card("demo")


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    """The demo model's tokenizer."""
    return Tokenizer(DEMO / "tokenizer.model")


@pytest.fixture
def serve_scripted(demo_card: ModelCard, demo_tokenizer: Tokenizer, tmp_path: Path) -> ServiceMaker:
    """Makes a service whose model replies with `reply`, then ends; other keywords are settings.

    Unless a card is given there is no response cache and as good as no quota: calls do not depend on each other.
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
        fingerprint: str = "scripted",
        **settings: object,
    ) -> AsyncIterator[Service]:
        card = card or plain_card
        reply_ids = demo_tokenizer.encode_raw(reply)[1:] + ([demo_tokenizer.eos_id] if ends else [])
        model = ScriptedModel(
            reply_ids,
            vocab_size=demo_tokenizer.vocab_size,
            context_length=card.context_length_limit,
            slots=card.max_concurrent_requests,
            probe_ids=demo_tokenizer.encode_chat(probe.PROMPT),
        )
        model.failure = failure
        eos_ids = frozenset({demo_tokenizer.eos_id})
        loaded = LoadedModel(demo_tokenizer, model, eos_ids, fingerprint)
        options = Settings.model_validate(
            {"listen": "127.0.0.1:0", "data_directory": tmp_path, "shutdown_grace_seconds": 5, **settings}
        )
        inputs = StartupInputs(
            card, accounts or AnonymousAuthenticator(), read_certificates(options), create_usage_store(options)
        )
        exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # The channel outlives the server, so that calls see how the server drains.
        async with (
            AsyncExitStack() as stack,
            start(options, inputs, exit_code, lambda *_: loaded, telemetry) as parts,
            serving(parts, options, exit_code) as address,
        ):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            model.probes = 0  # the warm-up does not count
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
                # Not before the drain has begun: who waits shall be refused, not served.
                opening = asyncio.create_task(open_gate_once_draining(model, parts.health))
                stack.push_async_callback(lambda: opening)

    return serve


async def open_gate_once_draining(model: ScriptedModel, health: HealthServicer) -> None:
    """Let the model run free as soon as the server says NOT_SERVING."""
    await until(lambda: not health.serving)
    model.open_gate()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    """A running PostgreSQL."""
    with running_postgres() as cluster:
        yield cluster


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority with a folder of its own."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    return Authority(folder)
