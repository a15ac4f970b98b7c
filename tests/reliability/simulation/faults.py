"""The faults of the simulation: functions that fail once (`points.py`), devices, stores, disks and processes."""

import asyncio
import errno
import itertools
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.reliability.simulation.points import ERRORS, POINTS
from tests.reliability.simulation.replica import Replica, ReplicaProcess
from tests.reliability.simulation.steps import DeviceFault
from tests.reliability.simulation.world import World
from tests.support.faults import InjectedFault
from tests.support.simulated.threads import PROCESS, pause

from llama2_server.engine.errors import NonFiniteLogits
from llama2_server.engine.sequence import FinishReason
from llama2_server.usage.local import statements
from llama2_server.usage.local.database import Database
from llama2_server.usage.local.local_ledger import file_of
from llama2_server.usage.local.writer import Writer

MEAN_SECONDS = 8.0
RESTART_SECONDS = 1.0

Fault = Callable[[Replica], Awaitable[None]]


class Faults:
    """Injects faults at random times; `names` are the possible ones, None for all."""

    def __init__(self, world: World, patch: pytest.MonkeyPatch, names: frozenset[str] | None) -> None:
        self._world = world
        self._draw, self._history = world.draw, world.history
        self._numbers = itertools.count(1)
        self._armed = dict.fromkeys(POINTS, 0)
        self._active: set[str] = set()
        self._full: set[str] = set()
        self._kill_at: str | None = None
        self._running: dict[asyncio.Task[None], None] = {}  # in order: a seed must cancel them in the same order
        for name, (owner, function) in POINTS.items():
            self._patch_point(patch, name, owner, function)
        self._patch_disk(patch)
        self._patch_kills(patch)
        self._faults = {name: fault for name, fault in self._all().items() if names is None or name in names}

    async def run(self, replicas: list[Replica]) -> None:
        """Inject faults until cancelled, and restart processes that have ended."""
        restarting = asyncio.create_task(self._restart(replicas))
        try:
            while self._faults:
                await asyncio.sleep(self._draw.expovariate(1 / MEAN_SECONDS))
                name, replica = self._draw.choice(list(self._faults)), self._draw.choice(replicas)
                if name in self._active:
                    continue
                process = "" if replica.process is None else replica.process.name
                number = next(self._numbers)
                self._history.add("fault", fault=name, process=process, number=number)
                task = asyncio.create_task(self._inject(name, number, replica))
                self._running[task] = None
                task.add_done_callback(self._running.pop)
            await asyncio.Event().wait()
        finally:
            restarting.cancel()

    def end_all(self) -> None:
        """End all faults."""
        for task in list(self._running):
            task.cancel()
        self._armed = dict.fromkeys(POINTS, 0)
        self._kill_at = None
        self._history.add("faults end")

    async def restart_if_ended(self, replica: Replica) -> None:
        """Start a process if the last one has ended or is about to."""
        while replica.process is None or not replica.process.alive or replica.process.exit_code.done():
            if replica.process is not None and replica.process.alive and replica.process.task is not None:
                await asyncio.wait([replica.process.task])
            await asyncio.sleep(self._draw.uniform(0, 2 * RESTART_SECONDS))
            await replica.start()

    async def _restart(self, replicas: list[Replica]) -> None:
        while True:
            await asyncio.sleep(RESTART_SECONDS)
            for replica in replicas:
                await self.restart_if_ended(replica)

    async def _inject(self, name: str, number: int, replica: Replica) -> None:
        self._active.add(name)
        try:
            await self._faults[name](replica)
        finally:
            self._active.discard(name)
            self._history.add("fault end", fault=name, number=number)

    def _all(self) -> dict[str, Fault]:
        points = {name: self._point(name) for name in POINTS}
        return points | {
            "the device": lambda replica: self._fail_step(replica, DeviceFault("device-side assert")),
            "out of memory": lambda replica: self._fail_step(replica, torch.OutOfMemoryError("out of memory")),
            "non-finite logits": lambda replica: self._fail_step(replica, NonFiniteLogits()),
            "the device for good": self._break_device,
            "a lost KV slot": self._lose_slot,
            "a hanging step": self._hang,
            "changed keys": self._change_keys,
            "an invalid keys file": self._break_keys,
            "the quota store": self._stop_redis,
            "a slow quota store": self._slow_redis,
            "the usage store": self._stop_store,
            "replies of the usage store": self._lose_replies,
            "a poison record": self._poison,
            "a full disk": self._fill_disk,
            "a deleted database": self._delete_database,
            "a replaced database": self._replace_database,
            "SIGKILL": self._kill,
            "SIGKILL at completion": lambda replica: self._kill_in("finish"),
            "SIGKILL after a commit": lambda replica: self._kill_in("resolve"),
            "SIGTERM": self._terminate,
        }

    def _point(self, name: str) -> Fault:
        async def arm(replica: Replica) -> None:
            self._armed[name] = 1
            await asyncio.sleep(30)
            self._armed[name] = 0

        return arm

    def _patch_point(self, patch: pytest.MonkeyPatch, name: str, owner: Any, function: str) -> None:
        original, error = getattr(owner, function), ERRORS.get(name, InjectedFault)

        def call(*args: Any, **options: Any) -> Any:
            if self._armed[name] and PROCESS.get() is not None:
                self._armed[name] -= 1
                self._raised(name)
                raise error(name)
            return original(*args, **options)

        patch.setattr(owner, function, call)

    def _raised(self, name: str) -> None:
        process = PROCESS.get()
        self._history.add("raised", fault=name, process="" if process is None else process.name)

    async def _fail_step(self, replica: Replica, error: Exception) -> None:
        process = replica.process
        if process is None:
            return
        process.steps.fail_next(error)
        try:
            await asyncio.sleep(1)
        finally:
            process.steps.forget(error)

    async def _break_device(self, replica: Replica) -> None:
        process = replica.process
        if process is not None and process.task is not None:
            await self._set_for(process.steps, "broken", True, 60)

    async def _lose_slot(self, replica: Replica) -> None:
        self._armed["returning the KV slot"] = 2
        await asyncio.sleep(10)
        self._armed["returning the KV slot"] = 0

    async def _hang(self, replica: Replica) -> None:
        if replica.process is not None:
            await self._set_for(replica.process.steps, "hang_seconds", self._draw.choice([2.0, 100.0]), 10)

    async def _change_keys(self, replica: Replica) -> None:
        """Change the file while it cannot be read; it is read after the next change."""
        self._armed["reading the keys"] = 1
        self._world.keys.write()
        await asyncio.sleep(2)
        self._armed["reading the keys"] = 0
        self._world.keys.write()

    async def _break_keys(self, replica: Replica) -> None:
        self._world.keys.write("keys: [")
        try:
            await asyncio.sleep(self._draw.uniform(0.5, 5))
        finally:
            self._world.keys.write()

    async def _stop_redis(self, replica: Replica) -> None:
        await self._set_for(self._world.redis, "up", False, self._draw.uniform(0.1, 15))

    async def _slow_redis(self, replica: Replica) -> None:
        await self._set_for(self._world.redis, "slow", True, 15)

    async def _stop_store(self, replica: Replica) -> None:
        await self._set_for(self._world.usage, "up", False, self._draw.uniform(0.1, 20))

    async def _lose_replies(self, replica: Replica) -> None:
        await self._set_for(self._world.usage, "loses_replies", True, 15)

    async def _poison(self, replica: Replica) -> None:
        account = f"a{self._draw.randrange(self._world.shape.accounts)}"
        await self._set_for(self._world.usage, "poisoned", account, self._draw.uniform(0.1, 1.0))

    async def _set_for(self, target: Any, name: str, value: object, seconds: float) -> None:
        if target is None:
            return
        normal = getattr(target, name)
        setattr(target, name, value)
        try:
            await asyncio.sleep(seconds)
        finally:
            setattr(target, name, normal)

    async def _fill_disk(self, replica: Replica) -> None:
        self._full.add(replica.name)
        try:
            await asyncio.sleep(self._draw.uniform(0.5, 15))
        finally:
            self._full.discard(replica.name)

    async def _delete_database(self, replica: Replica) -> None:
        process = replica.process
        if process is None or process.service is None or not process.alive or process.exit_code.done():
            return  # no process has the database open, so nothing could restore it
        file_of(replica.directory).unlink(missing_ok=True)
        await asyncio.sleep(3)

    async def _replace_database(self, replica: Replica) -> None:
        path = file_of(replica.directory)
        if not path.exists() or replica.moved_database.exists():
            return
        path.rename(replica.moved_database)
        path.write_bytes(b"")
        process = replica.process
        try:
            await asyncio.sleep(self._draw.uniform(0.1, 4))
        finally:
            if process is replica.process:
                replica.restore_database()

    async def _kill(self, replica: Replica) -> None:
        replica.kill()

    async def _kill_in(self, place: str) -> None:
        self._kill_at = place
        await asyncio.sleep(20)
        self._kill_at = None

    async def _terminate(self, replica: Replica) -> None:
        await replica.stop()

    def _patch_disk(self, patch: pytest.MonkeyPatch) -> None:
        transaction, probe = Database.transaction, Writer._probe_disk

        def is_full() -> bool:
            process = PROCESS.get()
            return process is not None and process.name.rstrip("0123456789") in self._full

        @contextmanager
        def transaction_on_disk(self: Database, *, writes: bool = True) -> Iterator[sqlite3.Connection]:
            with transaction(self, writes=writes) as connection:
                yield connection
                if writes and is_full():
                    raise sqlite3.OperationalError("database or disk is full")

        def probe_disk(self: Writer) -> None:
            if is_full():
                raise OSError(errno.ENOSPC, "No space left on device")
            probe(self)

        patch.setattr(Database, "transaction", transaction_on_disk)
        patch.setattr(Writer, "_probe_disk", probe_disk)

    def _patch_kills(self, patch: pytest.MonkeyPatch) -> None:
        finish, resolve = statements.finish, Writer._resolve

        def die(place: str) -> None:
            process = PROCESS.get()
            if self._kill_at == place and isinstance(process, ReplicaProcess) and process.ready.is_set():
                self._kill_at = None
                self._world.kill(process)
                pause(1)  # the thread never continues

        def finished(connection: sqlite3.Connection, record: Any) -> None:
            finish(connection, record)
            if record.outcome in FinishReason.__members__:  # its client is about to get the last message
                die("finish")

        def resolved(self: Writer, results: Any) -> None:
            die("resolve")
            resolve(self, results)

        patch.setattr(statements, "finish", finished)
        patch.setattr(Writer, "_resolve", resolved)
