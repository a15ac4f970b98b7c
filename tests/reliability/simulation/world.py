"""The world of a simulation: its seed, card, stores and history, and the patches that replace threads and clocks."""

import queue
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
import redis.asyncio
from tests.reliability.simulation.history import History
from tests.reliability.simulation.keys import Keys, patch_reload
from tests.reliability.simulation.stores import RedisState, SimulatedRedis, UsageDatabase
from tests.support.scripted_model import ScriptedModel, scripted_fingerprint
from tests.support.service import with_config
from tests.support.simulated import threads
from tests.support.simulated.threads import Process
from tests.support.virtual_time import VirtualTimeLoop

from llama2_server.admission.accounts import ApiKeyAuthenticator, Authenticator
from llama2_server.card import ModelCard, RequestsPerMinute, load_card
from llama2_server.config.settings import Settings
from llama2_server.engine import engine
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation import response_cache
from llama2_server.lifecycle import stores as lifecycle_stores
from llama2_server.lifecycle import tasks
from llama2_server.telemetry import guard
from llama2_server.usage import ledger
from llama2_server.usage.local import database, writer

if TYPE_CHECKING:
    from tests.reliability.simulation.replica import Replica

SCRIPT = "Once upon a time, a fox lived by the sea and told the gulls what it had seen."
STARTED_AT = datetime(2026, 11, 22, 23, 50, tzinfo=UTC)  # the day changes during the simulation


@dataclass(frozen=True)
class Shape:
    """The configuration of one simulation, which its seed determines."""

    accounts: int
    clients: int
    per_minute: int
    slots: int
    caches: bool
    shares_quota: bool
    forwards: bool
    pause_seconds: float
    settings: dict[str, Any]
    overload: bool = False
    """Whether no fault occurs, and most clients obey their retry times: then all of them are kept."""

    @classmethod
    def of(cls, draw: random.Random) -> "Shape":
        """Draw a configuration: from idle servers to 100 times overloaded ones."""
        settings = {
            "max_queue_size": draw.choice([0, 4, 16, 64]),
            "queue_timeout_seconds": draw.choice([5, 30, 300]),
            "engine_step_timeout_seconds": draw.choice([10, 30]),
            "readiness_probe_interval_seconds": draw.choice([5, 60, 300]),
            "shutdown_grace_seconds": draw.choice([0, 2, 30]),
            "quota_fallback": draw.choice(["reject", "local"]),
        }
        shares_quota, forwards = draw.random() < 0.4, draw.random() < 0.7
        if shares_quota:
            settings["redis_url"] = "redis://sim:1"
        return cls(
            accounts=draw.choice([2, 5, 20]),
            clients=draw.choice([20, 40, 80]),
            per_minute=draw.choice([12, 60, 600]),
            slots=draw.choice([1, 1, 3]),
            caches=draw.random() < 0.6,
            shares_quota=shares_quota,
            forwards=forwards,
            pause_seconds=draw.choice([0.3, 1.0, 4.0]),
            settings=settings,
        )

    @classmethod
    def overloaded(cls, draw: random.Random) -> "Shape":
        """Draw a configuration with many more clients than the queue has space for."""
        settings = {"max_queue_size": draw.choice([16, 32]), "queue_timeout_seconds": 300}
        return cls(
            accounts=draw.choice([3, 5, 20]),
            clients=80,
            per_minute=draw.choice([12, 60, 600]),
            slots=draw.choice([1, 3]),
            caches=draw.random() < 0.5,
            shares_quota=False,
            forwards=True,
            pause_seconds=0.5,
            settings=settings,
            overload=True,
        )


OVERLOAD_EVERY = 5
"""Every fifth seed is an overload without faults."""


class World:
    """The parts that the replicas and the clients of one simulation share."""

    def __init__(self, seed: int, folder: Path, shape: Shape | None = None) -> None:
        self.seed = seed
        self.draw = random.Random(seed)
        self.folder = folder
        self.history = History()
        drawn = Shape.of(self.draw) if seed % OVERLOAD_EVERY else Shape.overloaded(self.draw)
        self.shape = shape or drawn
        self.card = _card(self.shape)
        self.tokenizer = _tokenizer()
        self.script = self.tokenizer.encode_raw(SCRIPT)[1:]
        self.keys = Keys(folder)
        self.authenticator: Authenticator = ApiKeyAuthenticator(self.keys.path)
        self.fingerprint = scripted_fingerprint("scripted")
        options = {"data_directory": folder, "listen": "127.0.0.1:0", **self.shape.settings}
        self.settings = Settings.model_validate(options)
        self.usage = UsageDatabase(self.draw) if self.shape.forwards else None
        self.redis = RedisState(self.draw)
        self.replicas: list[Replica] = []

    def limit(self, account_id: str) -> int:
        """Return the account's requests per minute."""
        limits = self.card.constellation_config.max_requests_per_min
        return limits.accounts.get(account_id, limits.default)

    def scripted_model(self) -> ScriptedModel:
        """Return a model, of which the simulation uses only the properties."""
        vocab_size = self.tokenizer.vocab_size
        return ScriptedModel(
            self.script, vocab_size=vocab_size, context_length=self.card.context_length_limit, slots=self.shape.slots
        )

    def kill(self, process: Process) -> None:
        """Kill the replica of a process."""
        next(replica for replica in self.replicas if replica.process is process).kill()

    def close(self) -> None:
        """Delete the stores."""
        if self.usage is not None:
            self.usage.close()


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(Path(str(resources.files("llama2_server") / "demo")) / "tokenizer.model")


@cache
def _demo_card() -> ModelCard:
    return load_card("demo")


def _card(shape: Shape) -> ModelCard:
    changes: dict[str, object] = {
        "max_requests_per_min": RequestsPerMinute(default=shape.per_minute, accounts={"a0": 2 * shape.per_minute}),
        "max_concurrent_requests": shape.slots,
    }
    if not shape.caches:
        changes["infer_response_cache"] = None
    return with_config(_demo_card(), **changes)


@contextmanager
def simulated(world: World, loop: VirtualTimeLoop) -> Iterator[pytest.MonkeyPatch]:
    """Replace threads, sockets, Redis, clocks and random ids for the body; faults use the same patches."""
    with pytest.MonkeyPatch.context() as patch:
        thread_names = SimpleNamespace(Thread=threads.Thread, Condition=threads.Condition)
        for module in (engine, writer, tasks):
            patch.setattr(module, "threading", thread_names)
        queue_names = SimpleNamespace(SimpleQueue=threads.SimpleQueue, Empty=queue.Empty)
        patch.setattr(writer, "queue", queue_names)
        patch.setattr(threads.SimpleQueue, "delay", staticmethod(lambda: world.draw.uniform(0, 0.004)))
        patch.setattr(grpc.aio, "server", _server_of)
        SimulatedRedis.state = world.redis
        patch.setattr(redis.asyncio, "Redis", SimulatedRedis)
        _patch_time(patch, loop)
        _patch_migrations(patch, world.folder)
        patch_reload(patch, world.draw)
        patch.setattr(guard, "_logged_at", {})
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=world.draw.getrandbits(128), version=4))
        yield patch


def _server_of(*arguments: Any, **options: Any) -> Any:
    from tests.reliability.simulation.replica import server_of  # late: it imports this module

    return server_of(*arguments, **options)


def _patch_migrations(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Migrate one new database, and copy it to the others: a migration takes longer than 50 requests."""
    migrate, template = database._migrate, folder / "template.db"

    def copy_template(path: Path) -> None:
        if not template.exists():
            migrate(template)
        if path.stat().st_size == 0:
            shutil.copyfile(template, path)

    patch.setattr(database, "_migrate", copy_template)


def _patch_time(patch: pytest.MonkeyPatch, loop: VirtualTimeLoop) -> None:
    class VirtualDatetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return STARTED_AT + timedelta(seconds=loop.time())

    class VirtualTimeCache(response_cache.MemoryResponseCache):
        def __init__(self, **options: Any) -> None:
            super().__init__(clock=loop.time, **options)

    patch.setattr(time, "monotonic", loop.time)
    patch.setattr(time, "perf_counter", loop.time)
    patch.setattr(time, "time_ns", lambda: round((STARTED_AT.timestamp() + loop.time()) * 1e9))
    patch.setattr(ledger, "datetime", VirtualDatetime)
    patch.setattr(lifecycle_stores, "MemoryResponseCache", VirtualTimeCache)
