"""Retry times under overload: a seeded simulation in virtual time, with many accounts and clients that obey."""

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.admission.quota import RETURN_SECONDS, UNKEPT_SECONDS, Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.retry_times import CallIdentity
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import DeadlineExceeded, ResourceExhausted
from llama2_server.generation.rejection import retry_times

SECONDS = 1800.0
CLIENTS = 400
# Each client calls again 40 s after its last call, on average: without rejections, ten times what one slot serves.
PAUSE_SECONDS = 40.0


@dataclass(frozen=True)
class Load:
    """Accounts and limits of a simulation; a slot is held for 1 s on average, times the number of slots."""

    accounts: int
    per_minute: int
    slots: int = 1
    timeout_seconds: float | None = None
    returning: float = 1.0
    """Share of the rejected calls that return."""


class Simulation:
    """Clients whose calls pass the queue and the quota in the service's order, and return when they are told to."""

    def __init__(self, load: Load, seed: int) -> None:
        self.load = load
        self.random = random.Random(seed)
        self.queue = RequestQueue(load.slots, max_queue_size=64, queue_timeout_seconds=300)
        self.quota = Quota(RequestsPerMinute(default=load.per_minute))
        self.quota.expected_calls = self.queue.expected_calls
        self.attempts: list[int] = []
        self.returned = 0
        self.broken: Counter[str] = Counter()
        self.expired = 0
        self.busy_seconds = 0.0

    def hold_seconds(self) -> float:
        """Return the duration of a generation; 1% take more than twice the mean."""
        long = self.random.random() < 0.01
        return self.load.slots * (self.random.uniform(2, 4) if long else self.random.uniform(0.5, 1.5))

    async def attempt(self, account_id: str, identity: CallIdentity) -> None:
        """Generate once; raises the rejection with its retry time."""
        timeout = self.load.timeout_seconds
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        async with retry_times(self.queue, self.quota, account_id, identity):
            reservation = self.queue.reserve(account_id, deadline, identity)
            try:
                async with self.quota.charge(account_id):
                    self.queue.confirm(reservation)
                    async with self.queue.slot(reservation, deadline):
                        seconds = self.hold_seconds()
                        await asyncio.sleep(seconds)
                        self.busy_seconds += seconds
            finally:
                self.queue.release(reservation)

    async def call(self, account_id: str) -> None:
        """Try until the call is served, each time at most 1 s after its retry time."""
        identity, reason = CallIdentity(self.random.getrandbits(60)), ""
        for attempts in range(1, 100):
            self.returned += attempts > 1
            try:
                await self.attempt(account_id, identity)
            except DeadlineExceeded:
                self.expired += 1
                return
            except ResourceExhausted as error:
                if error.reason == reason:
                    self.broken[reason] += 1
                if self.random.random() >= self.load.returning:
                    return
                reason = error.reason
                await asyncio.sleep((error.retry_after_seconds or 0) + self.random.uniform(0, 1))
            else:
                self.attempts.append(attempts)
                return

    async def client(self, account_id: str) -> None:
        """Call again and again."""
        while True:
            await asyncio.sleep(self.random.expovariate(1 / PAUSE_SECONDS))
            await self.call(account_id)

    async def run(self) -> None:
        """Run all clients for a while."""
        clients = [asyncio.create_task(self.client(f"a{index % self.load.accounts}")) for index in range(CLIENTS)]
        await asyncio.sleep(SECONDS)
        for client in clients:
            client.cancel()
        results = await asyncio.gather(*clients, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results
        assert (self.queue.running, self.queue.waiting) == (0, 0)


LOADS = {
    "one client per account": Load(400, 5),
    "card's quota": Load(100, 5),
    "ten clients per account": Load(40, 60),
    "three accounts": Load(3, 60),
    "four slots": Load(40, 60, slots=4),
    "short deadlines": Load(400, 5, timeout_seconds=20),
    "short deadlines, ten clients per account": Load(40, 60, timeout_seconds=20),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_retry_times_are_kept(load: Load, seed: int) -> None:
    """At 10x overload, under 1% of the calls that return are rejected for the same reason; 3 attempts are enough."""
    simulation = Simulation(load, seed)
    run_virtual(simulation.run())
    assert simulation.returned > 1000
    assert sum(simulation.broken.values()) < 0.01 * simulation.returned, simulation.broken
    assert max(simulation.attempts) <= 3
    assert simulation.busy_seconds > 0.98 * load.slots * SECONDS
    assert simulation.expired < 0.02 * len(simulation.attempts)


@pytest.mark.parametrize("seed", [1, 2])
def test_calls_that_do_not_return_hold_no_slot(seed: int) -> None:
    """If four of five rejected calls never return, new requests use the slot, and the retry times are kept."""
    simulation = Simulation(Load(400, 5, timeout_seconds=20, returning=0.2), seed)
    run_virtual(simulation.run())
    assert sum(simulation.broken.values()) < 0.01 * simulation.returned
    assert max(simulation.attempts) <= 3
    assert simulation.busy_seconds > 0.9 * SECONDS


@pytest.mark.parametrize("seed", [1, 2])
def test_times_before_the_first_generation_ends_are_kept(seed: int) -> None:
    """All calls of a burst right after the start return once, with a duration that is only expected.

    The first generations are much shorter, and do not count yet.
    """

    async def main() -> None:
        simulation = Simulation(Load(400, 60), seed)
        simulation.queue.waits.expected_hold_seconds = 1.5
        short, hold_seconds = iter([0.05] * 3), simulation.hold_seconds
        simulation.hold_seconds = lambda: next(short, None) or hold_seconds()  # type: ignore[method-assign]
        await asyncio.gather(*(simulation.call(f"a{index}") for index in range(200)))
        assert simulation.returned == 200 - 65
        assert not simulation.broken

    run_virtual(main())


def test_new_calls_do_not_take_the_units_of_expected_calls() -> None:
    """A new call over another connection finds no quota until the expected call has come, or is a second late."""

    async def main() -> None:
        simulation = Simulation(Load(1, 2), 1)

        async def reason(key: int, connection: str) -> str:
            try:
                await simulation.attempt("a", CallIdentity(key, connection))
            except ResourceExhausted as error:
                return error.reason
            return ""

        assert [await reason(key, "one") for key in range(4)] == ["", "", "QUOTA_EXCEEDED", "QUOTA_EXCEEDED"]
        await asyncio.sleep(60.5 - asyncio.get_running_loop().time())
        assert await reason(4, "another") == "QUOTA_EXCEEDED"
        assert await reason(2, "another") == ""  # an equal call returns
        await asyncio.sleep(62.2 - asyncio.get_running_loop().time())
        assert await reason(5, "one") == ""  # its client sends another request instead

    run_virtual(main())


def test_a_quota_that_no_call_returns_for_is_used() -> None:
    """A unit that was kept for a call that does not return is free for others a second later."""

    async def main() -> None:
        simulation = Simulation(Load(1, 1), 1)
        await simulation.attempt("a", CallIdentity(1, "one"))
        with pytest.raises(ResourceExhausted):
            await simulation.attempt("a", CallIdentity(2, "one"))
        await asyncio.sleep(62.5 - asyncio.get_running_loop().time())
        await simulation.attempt("a", CallIdentity(3, "another"))

    run_virtual(main())


@pytest.mark.parametrize("pause_seconds", [0.3, 3])
def test_clients_that_never_return_do_not_lock_their_account_out(pause_seconds: float) -> None:
    """An account that sends another request each time, over another connection, still gets nearly its whole quota."""

    async def main() -> None:
        simulation, served = Simulation(Load(1, 5), 1), 0
        for key in range(round(600 / pause_seconds)):
            with suppress(ResourceExhausted):
                await simulation.attempt("a", CallIdentity(key))
                served += 1
            await asyncio.sleep(pause_seconds)
        assert served >= 0.9 * 5 * 10

    run_virtual(main())


def test_a_call_that_returns_too_early_keeps_its_time() -> None:
    """A client that repeats a rejected request all the time is told the same time, and then served."""

    async def main() -> None:
        simulation = Simulation(Load(1, 1), 1)
        await simulation.call("a")
        started_at = asyncio.get_running_loop().time()
        told = set()
        while True:
            try:
                await simulation.attempt("a", CallIdentity(7))
            except ResourceExhausted as error:
                told.add(round(asyncio.get_running_loop().time() + (error.retry_after_seconds or 0), 3))
                await asyncio.sleep(0.5)
            else:
                break
        assert len(told) == 1
        assert asyncio.get_running_loop().time() - started_at < 65

    run_virtual(main())


@pytest.mark.parametrize("seed", [1, 2])
def test_quota_rejections_are_told_apart(seed: int) -> None:
    """Without a queue, the calls beyond an account's quota get different times, and each of them is served then."""

    async def main() -> None:
        simulation = Simulation(Load(1, 5), seed)
        simulation.hold_seconds = lambda: 0.001  # type: ignore[method-assign]
        await asyncio.gather(*(simulation.call("a") for _ in range(40)))
        assert Counter(simulation.attempts) == {1: 5, 2: 35}
        # The quota is promised again a second after the latest return, and after the time in which others can use it.
        assert 7 * 60 <= asyncio.get_running_loop().time() <= 7 * (60 + RETURN_SECONDS + UNKEPT_SECONDS) + 1

    run_virtual(main())
