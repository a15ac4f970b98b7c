"""Run one simulation: start the replicas, send the requests, inject the faults, and let everything come to rest."""

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from prometheus_client import CollectorRegistry
from tests.reliability.simulation.clients import Traffic
from tests.reliability.simulation.faults import Faults
from tests.reliability.simulation.history import History
from tests.reliability.simulation.model.rules import Judgment, judge
from tests.reliability.simulation.observer import observe
from tests.reliability.simulation.planted import Plant
from tests.reliability.simulation.replica import Replica
from tests.reliability.simulation.world import Shape, World, simulated
from tests.support.simulated.threads import SimulationLoop

from llama2_server.usage.local import statements
from llama2_server.usage.local.instance_lock import InstanceLock
from llama2_server.usage.local.local_ledger import file_of
from llama2_server.usage.records import UsageRecord

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a disk syncs slowly
SETTLE_SECONDS = 60.0
REQUESTS_PER_SEED = 2000
SEEDS_PER_PROCESS = 10

Result = TypeVar("Result")


@contextlib.contextmanager
def simulated_world(seed: int, shape: Shape | None) -> Iterator[tuple[World, asyncio.Runner, pytest.MonkeyPatch]]:
    """Create a world, the runner of its virtual time, and the patches of both for the body."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simulation-", dir=MEMORY)))
        runner = stack.enter_context(asyncio.Runner(loop_factory=SimulationLoop))
        loop = runner.get_loop()
        assert isinstance(loop, SimulationLoop)
        world = World(seed, folder, shape)
        stack.callback(_close_files, folder)
        stack.callback(world.close)
        yield world, runner, stack.enter_context(simulated(world, loop))


def simulate(
    seed: int,
    requests: int,
    faults: frozenset[str] | None = None,
    plant: Plant | None = None,
    shape: Shape | None = None,
) -> History:
    """Return the history of one simulation, which the seed determines.

    Args:
        seed: determines configuration, clients, faults and their order.
        requests: number of calls.
        faults: the names of the possible faults; None for all of the shape.
        plant: changes the server, so that the model must find an error.
        shape: the configuration; None for the one of the seed.
    """
    with simulated_world(seed, shape) as (world, runner, patch):
        if plant is not None:
            plant(patch)
        if faults is None and world.shape.overload:
            faults = frozenset()
        injected = Faults(world, patch, faults)
        observe(patch, world.history)
        runner.run(_simulate(world, injected, requests))
        return world.history


def fault_names(text: str | None) -> frozenset[str] | None:
    """Return the names of an option's value, which are separated by commas; `none` is no name."""
    return None if text is None else frozenset(text.split(",")) - {"none"}


def summary(faults: frozenset[str] | None, seed: int) -> tuple[Judgment, Counter[str], Counter[str]]:
    """Return the judgment of a seed, its calls by status code, and its faults by name."""
    try:
        history = simulate(seed, REQUESTS_PER_SEED, faults)
    except Exception as error:  # a seed that stops its simulation must not end the other ones
        return Judgment([f"the simulation stopped: {error!r}"], Counter(), 0), Counter(), Counter()
    codes = Counter(event["code"] for event in history.of("end"))
    return judge(history), codes, Counter(event["fault"] for event in history.of("fault"))


def for_seeds(function: Callable[[int], Result], seeds: range, processes: int) -> Iterator[tuple[int, Result]]:
    """Yield each seed with its result, in order.

    The threads of a process that was killed in a simulation never end, so a process simulates only some seeds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(processes, maxtasksperchild=SEEDS_PER_PROCESS) as pool:
        yield from zip(seeds, pool.imap(function, seeds), strict=True)


async def _simulate(world: World, faults: Faults, requests: int) -> None:
    shape, history = world.shape, world.history
    limits = {f"a{index}": world.limit(f"a{index}") for index in range(shape.accounts)}
    costs = {name: str(cost) for name, cost in world.card.neuron_costs.items()}
    sizes = {"slots": shape.slots, "queue": shape.settings["max_queue_size"]}
    shared = {"quota": shape.shares_quota, "usage": shape.forwards}
    history.add("shape", seed=world.seed, limits=limits, costs=costs, shared=shared, **sizes)
    replicas = world.replicas = [Replica(world, name) for name in ("left", "right")]
    for replica in replicas:
        await replica.start()
    injecting = asyncio.create_task(faults.run(replicas))
    traffic = Traffic(world, replicas, requests)
    try:
        await traffic.run()
    finally:
        injecting.cancel()
        await asyncio.wait([injecting])
    await settle(world, faults)


async def settle(world: World, faults: Faults) -> None:
    """End the faults, let everything come to rest, stop the replicas, and add what they leave to the history."""
    faults.end_all()
    for _ in range(2):  # a step that hangs ends its process later
        for replica in world.replicas:
            await faults.restart_if_ended(replica)
        await asyncio.sleep(SETTLE_SECONDS)
    world.history.add("rest")
    _add_states(world.history, world.replicas)
    for replica in world.replicas:
        await replica.stop()
    _add_records(world, world.replicas)


def _add_states(history: History, replicas: list[Replica]) -> None:
    """Add what is left in the processes when no call runs."""
    for replica in replicas:
        process = replica.process
        if process is None or process.service is None:
            continue
        service = process.service
        engine = service.engine._engine
        history.add(
            "state",
            process=process.name,
            running=service.queue.running,
            waiting=service.queue.waiting,
            pending=service.ledger.pending,
            admitted=len(service.ledger._running),
            serving=service.health.serving,
            stores=dict(service.health._stores),
            kv_slots=len(engine._running._prefix_cache._free) + len(engine._running),  # a probe may run
            violations=process.steps.violations,
            metrics=counters(service.telemetry.metrics.registry),
        )


def counters(registry: CollectorRegistry) -> dict[str, float]:
    """Return the counters that the records and the calls determine."""
    values: Counter[str] = Counter()
    for family in registry.collect():
        for sample in family.samples:
            if sample.name in ("llama2_tokens_total", "llama2_neurons_total", "llama2_requests_total"):
                values[sample.labels.get("type", sample.name)] += sample.value  # type: ignore[assignment]
    return dict(values)


def _add_records(world: World, replicas: list[Replica]) -> None:
    """Add all records of all databases, and the totals that differ from their records."""
    for replica in replicas:
        with contextlib.closing(sqlite3.connect(file_of(replica.directory))) as connection:
            add_database(world.history, replica.name, connection)
    if world.usage is not None:
        add_database(world.history, "store", world.usage.connection)


def add_database(history: History, name: str, connection: sqlite3.Connection) -> None:
    for record in _all_records(connection):
        history.add(
            "record",
            database=name,
            id=record.request_id,
            account=record.account_id,
            usage=[record.input_tokens, record.output_tokens],
            neurons=str(record.neurons),
            cached=record.cached,
            outcome=record.outcome,
        )
    running = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'running_requests'").fetchone()[0]
    if running:
        running = connection.execute("SELECT count(*) FROM running_requests").fetchone()[0]
    history.add("database", database=name, wrong_totals=len(statements.wrong_totals(connection)[0]), running=running)


def _all_records(connection: sqlite3.Connection) -> list[UsageRecord]:
    return statements._records(connection, "1", ())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing: thousands of injected faults would."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


def _close_files(folder: Path) -> None:
    """Close what killed processes have open: their threads never end, and keep it."""
    for one in gc.get_objects():
        if type(one) is sqlite3.Connection:
            with contextlib.suppress(sqlite3.Error):  # already closed
                if one.execute("PRAGMA database_list").fetchone()[2].startswith(str(folder)):
                    one.close()
        elif type(one) is InstanceLock:
            with contextlib.suppress(OSError):  # released
                if os.readlink(f"/proc/self/fd/{one._descriptor}").startswith(str(folder)):
                    os.close(one._descriptor)
