"""The only place that wires the parts: load -> warm up -> listen -> wait -> drain."""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import grpc.aio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tqdm import tqdm

from llama2.v1 import (
    account_pb2,
    account_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    text_generation_pb2,
    text_generation_pb2_grpc,
)
from llama2_server.accounts import Accounts, KeyAccounts, OpenAccounts
from llama2_server.cache import MemoryResponseCache, RedisResponseCache, ResponseCache
from llama2_server.card import ModelCard, load_card
from llama2_server.engine.engine import Engine, Finish, FinishReason
from llama2_server.engine.model import Model
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.tokenizer import Tokenizer
from llama2_server.engine.weights import fetch_checkpoint, load_model, read_eos_ids
from llama2_server.health import HealthServicer
from llama2_server.information import AccountServicer, ModelServicer
from llama2_server.interceptor import ErrorInterceptor
from llama2_server.ledger.ledger import Ledger
from llama2_server.quota import Quota
from llama2_server.servicer import Parts, TextGenerationServicer
from llama2_server.settings import Settings
from llama2_server.slots import Slots

logger = logging.getLogger(__name__)

SERVICES = (
    text_generation_pb2.DESCRIPTOR.services_by_name["TextGenerationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name,
)
# A step of a 7B model on a slow CPU takes seconds; one that takes longer than this is not waited for.
LAST_STEP_SECONDS = 10.0
SMALL_CHECKPOINT_BYTES = 32 * 1024 * 1024


class StartError(Exception):
    """The server cannot start; the message is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What has to be there before the port opens."""

    card: ModelCard
    accounts: Accounts
    tokenizer: Tokenizer
    model: Model
    eos_ids: frozenset[int]


def load(settings: Settings) -> Loaded:
    """Read the card and load the weights onto the device.

    Raises:
        CardError, KeysFileError, WeightsError, StartError: each with one line for the operator.
    """
    begun = time.monotonic()
    card = load_card(settings.card)
    accounts = OpenAccounts() if settings.keys_file is None else KeyAccounts(settings.keys_file)
    checkpoint = _demo_checkpoint() if settings.weights is None else fetch_checkpoint(settings.weights)
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    with tqdm(desc="loading weights", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model = load_model(
            checkpoint,
            device=_device(settings),
            dtype=getattr(torch, settings.dtype or card.generation_config.dtype),
            context_length=card.context_length_limit,
            slots=card.max_concurrent_requests,
            progress=show,
        )
    if sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < SMALL_CHECKPOINT_BYTES:
        # Two threads would wait for one another longer than one takes alone, above all on a busy machine.
        torch.set_num_threads(1)
    logger.info("loaded %s on %s as %s in %.1f s", card.name, model.device, model.dtype, time.monotonic() - begun)
    return Loaded(card, accounts, tokenizer, model, read_eos_ids(checkpoint))


async def serve(settings: Settings, loaded: Loaded) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    Raises:
        StartError: the warm-up failed, or the address cannot be listened on.
    """
    stop = asyncio.Event()
    _on_signals(stop)
    async with running(settings, loaded) as address:
        _say_serving(address)
        await stop.wait()
        logger.info("draining for up to %.0f s; Ctrl-C or SIGTERM once more ends at once", settings.grace_seconds)
    logger.info("stopped")


@asynccontextmanager
async def running(settings: Settings, loaded: Loaded) -> AsyncIterator[str]:
    """Warm up, listen and be SERVING for the body of the `async with`, which gets the address; then drain.

    Raises:
        StartError: as `serve`.
        LedgerError: the ledger cannot be opened as it is configured.
    """
    async with AsyncExitStack() as stack:
        parts = await _open_parts(settings, loaded, stack)
        servicer = TextGenerationServicer(parts)
        health = HealthServicer(SERVICES)
        server = _server(settings, parts, servicer, health)
        try:
            await asyncio.to_thread(_warm_up, parts.engine, parts.tokenizer)
            address = _listen(server, settings.listen)
            await server.start()
            health.set_serving(True)
            yield address
        finally:
            # Tell balancers first, refuse those who wait, let running calls finish.
            health.close()
            parts.slots.close()
            await server.stop(settings.grace_seconds)
            # `stop` returns while the engine may still be in its last step; what it computed has to be recorded.
            await asyncio.to_thread(parts.engine.close, LAST_STEP_SECONDS)
            await servicer.close()


async def _open_parts(settings: Settings, loaded: Loaded, stack: AsyncExitStack) -> Parts:
    """Everything behind the port; the stack closes the stores, once nothing uses them any more."""
    card = loaded.card
    ledger = await Ledger.open(
        data_directory=settings.data_directory,
        neuron_costs=card.neuron_costs,
        url=settings.ledger_url.get_secret_value() if settings.ledger_url else None,
        journal_limit_bytes=settings.journal_max_bytes,
    )
    stack.push_async_callback(ledger.close)
    quota = _quota(settings, card)
    stack.push_async_callback(quota.close)
    cache = _cache(settings, card)
    if cache is not None:
        stack.push_async_callback(cache.close)
    if isinstance(loaded.accounts, KeyAccounts):
        watching = asyncio.create_task(loaded.accounts.watch())
        stack.callback(watching.cancel)
    slots = Slots(
        card.max_concurrent_requests,
        line_limit=settings.line_limit,
        queue_timeout_seconds=settings.queue_timeout_seconds,
    )
    engine = Engine(loaded.model, loaded.eos_ids)
    return Parts(card, loaded.accounts, loaded.tokenizer, quota, cache, ledger, slots, engine)


def _quota(settings: Settings, card: ModelCard) -> Quota:
    try:
        return Quota(
            card.constellation_config.max_requests_per_min,
            redis_url=settings.redis_url.get_secret_value() if settings.redis_url else None,
            when_store_down=settings.when_quota_store_down,
            model=card.name,
        )
    except (ValueError, ImportError) as error:
        raise StartError(f"redis_url: {error}") from error


def _cache(settings: Settings, card: ModelCard) -> ResponseCache | None:
    """The response cache that the card asks for, if it does; in Redis where there is one to share."""
    if card.constellation_config.infer_response_cache is None:
        return None
    ttl_seconds = settings.cache_ttl_seconds
    if settings.redis_url is None:
        return MemoryResponseCache(max_bytes=settings.cache_max_bytes, ttl_seconds=ttl_seconds)
    url = settings.redis_url.get_secret_value()
    return RedisResponseCache(url, ttl_seconds=ttl_seconds, max_entry_bytes=settings.cache_max_entry_bytes)


def _server(
    settings: Settings, parts: Parts, servicer: TextGenerationServicer, health: HealthServicer
) -> grpc.aio.Server:
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor()],
        options=[
            # Without it a second server would share the port in silence.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            # gRPC advertises no limit by default: one connection could open any number of calls.
            ("grpc.max_concurrent_streams", settings.line_limit + parts.card.max_concurrent_requests + 100),
        ],
    )
    text_generation_pb2_grpc.add_TextGenerationServiceServicer_to_server(servicer, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(parts.card), server)
    usage = AccountServicer(parts.accounts, parts.quota, parts.ledger)
    account_pb2_grpc.add_AccountServiceServicer_to_server(usage, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflection:
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, health_name, reflection.SERVICE_NAME), server)
    return server


def _listen(server: grpc.aio.Server, listen: str) -> str:
    """The address listened on, with the port that was taken for port 0."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if port == 0:
        raise StartError(f"listen: cannot listen on {listen}: is the port in use? Choose another with --listen")
    return f"{listen.rpartition(':')[0]}:{port}"


def _warm_up(engine: Engine, tokenizer: Tokenizer) -> None:
    """Generate two tokens, so that the first caller does not wait for the first use of anything."""
    finished = threading.Event()
    results: list[Finish] = []

    class _Wait:
        def on_token(self, token_id: int) -> bool:
            return False

        def on_finish(self, finish: Finish) -> None:
            results.append(finish)
            finished.set()

    engine.submit(tokenizer.encode_raw("Hello"), GenerationParams(max_tokens=2), _Wait())
    finished.wait()
    if results[0].reason is FinishReason.FAILED:
        raise StartError("the model cannot generate; the log above says why")


def _on_signals(stop: asyncio.Event) -> None:
    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


def _device(settings: Settings) -> str:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise StartError("device: cuda was asked for and torch finds none; use --device cpu, or install a CUDA build")
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _demo_checkpoint() -> Path:
    return Path(str(resources.files("llama2_server") / "demo"))


def _say_serving(address: str) -> None:
    prompt = "Tell me a story about a fox who lives by the sea."
    method = "llama2.v1.TextGenerationService/GenerateStream"
    body = f'{{"prompt": "{prompt}"}}'
    here = "" if address == "127.0.0.1:50051" else f"--address {address} "
    command = Path(sys.executable).parent / "llama2"
    llama2 = os.path.relpath(command) if command.is_relative_to(Path.cwd()) else command.name
    print(
        f"SERVING on {address}. Ctrl-C stops. In another terminal, try:\n\n"
        f'  {llama2} {here}generate "{prompt}"\n'
        f"  {llama2} {here}chat\n"
        f"  grpcurl -plaintext -d '{body}' {address} {method}\n",
        flush=True,
    )
