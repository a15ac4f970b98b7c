"""One replica: the whole service on the simulation's loop, which can be stopped, killed and started again."""

import asyncio
import itertools
import shutil
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import grpc
from tests.reliability.simulation.history import History
from tests.reliability.simulation.observer import HistoryTelemetry
from tests.reliability.simulation.steps import ScriptedSteps
from tests.reliability.simulation.stores import SimulatedStore
from tests.reliability.simulation.world import World
from tests.support.simulated.grpc_server import InProcessCall, InProcessServer, Metadata
from tests.support.simulated.threads import PROCESS, Process

from llama2_server.app import Service, serving, start
from llama2_server.configuration_error import ConfigurationError
from llama2_server.lifecycle.model_loading import LoadedModel
from llama2_server.lifecycle.preflight import StartupInputs
from llama2_server.lifecycle.tasks import StartupCancelled
from llama2_server.usage.local.local_ledger import file_of

STOPPED = 143
"""Exit code of a process that SIGTERM ends."""


class ReplicaProcess(Process):
    """One process of a replica, from its start to its end."""

    def __init__(self, name: str, world: World, directory: Path) -> None:
        super().__init__(name)
        self.world = world
        self.directory = directory
        self.steps = ScriptedSteps(world.script, world.tokenizer.eos_id, world.draw, self._on_fault)
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.exit_code.add_done_callback(
            lambda code: world.history.add("end of process", process=name, code=code.result())
        )
        self.ready = asyncio.Event()
        self.service: Service | None = None
        self.server: InProcessServer | None = None
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Run the service until `exit_code` is set."""
        world = self.world
        settings = world.settings.model_copy(update={"data_directory": self.directory})
        store = None if world.usage is None else SimulatedStore(world.usage, self)
        inputs = StartupInputs(world.card, world.authenticator, None, usage_store=store)
        telemetry = HistoryTelemetry(world.history, self.name)
        async with start(settings, inputs, self.exit_code, self._load, telemetry) as service:
            self.service = service
            async with serving(service, settings, self.exit_code):
                self.ready.set()
                await self.exit_code

    def kill(self) -> None:
        """End the process as SIGKILL does."""
        if self.alive:
            if self.server is not None:
                self.server.break_off()
            super().kill()
            self.ready.set()

    def _on_fault(self, error: Exception) -> None:
        self.world.history.add("raised", fault=type(error).__name__, process=self.name)

    def _load(self, *_: object) -> LoadedModel:
        world = self.world
        model = world.scripted_model()
        return LoadedModel(world.tokenizer, model, frozenset({world.tokenizer.eos_id}), world.fingerprint, self.steps)


class Replica:
    """A replica, whose processes follow each other on the same disk."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self._numbers = itertools.count(1)
        self.directory = world.folder / f"{name}0"
        self.process: ReplicaProcess | None = None
        self.processes: list[ReplicaProcess] = []

    @property
    def history(self) -> History:
        """The history of the simulation."""
        return self._world.history

    @property
    def moved_database(self) -> Path:
        """The path of the usage database while another file is in its place."""
        return self.directory / "moved"

    def restore_database(self) -> None:
        """Move the usage database back, as an operator does at the latest before the next start."""
        if self.moved_database.exists():
            self.moved_database.rename(file_of(self.directory))

    async def start(self) -> None:
        """Start a process, and wait until it serves."""
        self.restore_database()
        number = next(self._numbers)
        process = ReplicaProcess(f"{self.name}{number}", self._world, self.directory)
        self.process = process
        self.processes.append(process)
        context = copy_context()
        context.run(PROCESS.set, process)
        process.task = asyncio.get_running_loop().create_task(self._run(process), context=context)
        process.task.add_done_callback(lambda _: process.ready.set())
        await process.ready.wait()
        self.history.add("start", process=process.name)

    async def stop(self) -> None:
        """Drain the process as SIGTERM does, and wait for its end."""
        process = self.process
        if process is None or not process.alive:
            return
        if not process.exit_code.done():
            process.exit_code.set_result(STOPPED)
        if process.task is not None:
            await asyncio.wait([process.task])

    def kill(self) -> None:
        """Kill the process; what it has not written is lost, and its files do not change."""
        process = self.process
        if process is None or not process.alive:
            return
        self.history.add("kill", process=process.name)
        process.kill()
        # The dead process cannot be removed from this one: it keeps the old files, and the next one gets a copy.
        self.directory = self._world.folder / process.name
        shutil.copytree(process.directory, self.directory, ignore=shutil.ignore_patterns("*-shm"))

    def call(self, method: str, request: bytes, metadata: Metadata, timeout: float | None) -> InProcessCall:
        """Call a method of the running process."""
        call = InProcessCall(method, request, metadata, timeout)
        server = None if self.process is None else self.process.server
        if server is None:
            call.end(grpc.StatusCode.UNAVAILABLE, "failed to connect")
        else:
            server.call(call)
        return call

    async def _run(self, process: ReplicaProcess) -> None:
        try:
            with suppress(asyncio.CancelledError):
                await process.run()
        except (ConfigurationError, StartupCancelled) as error:
            self.history.add("start failed", process=process.name, reason=str(error))
        except Exception as error:
            if process.alive:  # a fault in the warm-up also ends the process, before it serves
                event = "crash" if process.ready.is_set() else "start failed"
                self.history.add(event, process=process.name, reason=repr(error))
        finally:
            if process.alive:
                code = process.exit_code.result() if process.exit_code.done() else None
                self.history.add("exit", process=process.name, code=code)
                process.kill()


def server_of(*arguments: Any, **options: Any) -> InProcessServer:
    """Stand for grpc.aio.server: the process of the caller gets the server."""
    process = PROCESS.get()
    assert isinstance(process, ReplicaProcess)
    process.server = InProcessServer(*arguments, **options)
    return process.server
