"""Fairness between accounts when the request queue is full, in virtual time."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.reservation import SlotLease
from llama2_server.admission.retry_times import CallIdentity
from llama2_server.errors import QueueFull, ServiceError, ShuttingDown

CLIENTS = {"a": 60, "b": 30, "c": 15}
"""Clients per account that return when they are told to."""


class Machine:
    """A queue with one slot, whose generations take between 0.5 and 1.5 s and are counted when they start."""

    def __init__(self, max_queue_size: int, seed: int = 1) -> None:
        self.queue = RequestQueue(1, max_queue_size=max_queue_size, queue_timeout_seconds=10_000)
        self.started: list[str] = []
        self.rejected: Counter[str] = Counter()
        self._random = random.Random(seed)

    async def call(self, account_id: str) -> int:
        """Run one generation; return how many others started between the arrival and its start."""
        arrived = len(self.started)
        async with self.slot(account_id):
            self.started.append(account_id)
            waited = len(self.started) - arrived
            await asyncio.sleep(self._random.uniform(0.5, 1.5))
        return waited

    def slot(self, account_id: str) -> AbstractAsyncContextManager[SlotLease]:
        return self.queue.slot(self.queue.enter(account_id, None), None)

    async def call_forever(self, account_id: str) -> None:
        """Call again after each reply and, after a short wait, after each rejection."""
        while True:
            try:
                await self.call(account_id)
            except QueueFull:
                self.rejected[account_id] += 1
                await asyncio.sleep(0.05)

    async def call_when_told(self, account_id: str) -> None:
        """Call again at once after each reply, and after a rejection when it states."""
        while True:
            identity = CallIdentity(self._random.getrandbits(60))
            while not await self._call_equal(account_id, identity):
                pass

    async def _call_equal(self, account_id: str, identity: CallIdentity) -> bool:
        """Run one generation, or wait until the retry time; return whether it was served.

        A start counts if all accounts wait: an account whose calls are all told to return later gets no slot then.
        """
        try:
            reservation = self.queue.reserve(account_id, None, identity)
            self.queue.confirm(reservation)
            async with self.queue.slot(reservation, None):
                if all(other == account_id or self.queue._waiting.count(other) for other in CLIENTS):
                    self.started.append(account_id)
                await asyncio.sleep(self._random.uniform(0.5, 1.5))
        except QueueFull as error:
            earliest = error.retry_after_seconds or 0.0
            told = self.queue.add_retry_time(account_id, identity, earliest, 600, keeps_order=error.keeps_order)
            await asyncio.sleep(told + self._random.uniform(0, 1))
            return False
        return True

    def flood(self, account_id: str, clients: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.call_forever(account_id)) for _ in range(clients)]


def jain_index(served: Sequence[int]) -> float:
    """Return Jain's index of fairness: 1 if all are served equally, 1/n if only one of n is served."""
    return sum(served) ** 2 / (len(served) * sum(one * one for one in served))


@pytest.mark.parametrize("max_queue_size", [2, 8, 64])
def test_calls_of_another_account_are_served_during_a_flood(max_queue_size: int) -> None:
    """15 calls, one after another, each get a slot at most three generations after they arrive."""

    async def main() -> None:
        machine = Machine(max_queue_size)
        flood = machine.flood("flood", 2 * max_queue_size)
        await asyncio.sleep(10)
        assert machine.queue.waiting == max_queue_size
        for _ in range(15):
            assert await machine.call("quiet") <= 3
            await asyncio.sleep(0.3)
        assert machine.rejected.keys() == {"flood"}
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        assert (machine.queue.running, machine.queue.waiting) == (0, 0)

    run_virtual(main())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_accounts_that_always_wait_are_served_equally(seed: int) -> None:
    """Jain's index over 100 generations is at least 0.95, with 2 to 64 clients per account and a small queue."""

    async def main() -> None:
        machine = Machine(16, seed)
        accounts = {"a": 64, "b": 2, "c": 16, "d": 2, "e": 4, "f": 3}
        for account_id, clients in accounts.items():
            machine.flood(account_id, clients)
        await asyncio.sleep(20)
        before = Counter(machine.started)
        while sum((Counter(machine.started) - before).values()) < 100:
            await asyncio.sleep(0.1)
        served = Counter(machine.started) - before
        assert jain_index([served[account_id] for account_id in accounts]) >= 0.95

    run_virtual(main())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calls_that_return_are_served_once_per_round(seed: int) -> None:
    """Accounts with 60, 30 and 15 clients, which return when they are told to, get equal shares while all wait."""

    async def main() -> None:
        machine = Machine(16, seed)
        clients = [
            asyncio.create_task(machine.call_when_told(account_id))
            for account_id, number in CLIENTS.items()
            for _ in range(number)
        ]
        await asyncio.sleep(1000)
        served = Counter(machine.started)
        assert served.total() > 100
        assert jain_index([served[account_id] for account_id in CLIENTS]) >= 0.99, served
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    run_virtual(main())


def test_requests_that_leave_let_their_account_move_up() -> None:
    """An account whose clients hang up keeps its share: its other requests take their rounds."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=16, queue_timeout_seconds=300)
        running = queue.enter("x", None)
        waiting = [queue.enter(account_id, None) for account_id in "aaaaaabbb"]
        for left in (waiting[0], waiting[2], waiting[3]):
            queue.release(left)
        served = []
        while queue.waiting:
            queue.release(running)
            [running] = [one for one in waiting if one.granted]
            served.append(running.account_id)
        assert "".join(served) == "ababab"
        queue.release(running)

    run_virtual(main())


async def fill(queue: RequestQueue, account_ids: str) -> list[asyncio.Task[str]]:
    """Hold the slot, and queue requests of these accounts in order; each task returns its outcome."""

    async def call(account_id: str) -> str:
        try:
            async with queue.slot(queue.enter(account_id, None), None):
                await asyncio.sleep(1)
        except ServiceError as error:
            return error.reason
        return "OK"

    tasks = []
    for account_id in account_ids:
        tasks.append(asyncio.create_task(call(account_id)))
        await asyncio.sleep(0)
    return tasks


def test_newest_request_of_the_largest_account_is_displaced() -> None:
    """The newcomer takes the place of the largest account's newest request, which fails with QUEUE_FULL."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=5, queue_timeout_seconds=100)
        tasks = await fill(queue, "-aabbbc")
        outcomes = await asyncio.gather(*tasks)
        assert outcomes == ["OK", "OK", "OK", "OK", "OK", "QUEUE_FULL", "OK"]

    run_virtual(main())


def test_one_place_fewer_displaces_no_request() -> None:
    """An account needs at least two requests fewer than the largest; otherwise the newcomer is rejected."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=3, queue_timeout_seconds=100)
        tasks = await fill(queue, "-abcdc")
        assert await asyncio.gather(*tasks) == ["OK", "OK", "OK", "OK", "QUEUE_FULL", "QUEUE_FULL"]

    run_virtual(main())


def test_a_request_is_displaced_only_after_the_confirmation() -> None:
    """A reservation in a full queue displaces no request until it is confirmed, and none if it is released."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=3, queue_timeout_seconds=100)
        tasks = await fill(queue, "-aaa")
        for _ in range(3):  # a released one does not count for the share of its account
            queue.release(queue.reserve("b", None))
        reservation = queue.reserve("b", None)
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        queue.confirm(reservation)
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False, False, False, True]
        async with queue.slot(reservation, None):
            pass
        assert await asyncio.gather(*tasks) == ["OK", "OK", "OK", "QUEUE_FULL"]

    run_virtual(main())


def test_reservations_of_one_account_displace_no_more_than_its_share() -> None:
    """Requests that await their quota count: together they get no more of the queue than one after another."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=6, queue_timeout_seconds=100)
        tasks = await fill(queue, "-aaaaaa")
        reservations = [queue.reserve("b", None) for _ in range(5)]
        with pytest.raises(QueueFull):
            queue.reserve("b", None)
        for reservation in reservations[:3]:
            queue.confirm(reservation)
        for reservation in reservations[3:]:
            with pytest.raises(QueueFull):
                queue.confirm(reservation)
        assert queue.waiting == 6
        for reservation in reservations:
            queue.release(reservation)
        assert (await asyncio.gather(*tasks)).count("QUEUE_FULL") == 3
        assert (queue.running, queue.waiting) == (0, 0)

    run_virtual(main())


def test_reservation_can_be_displaced() -> None:
    """A request that still awaits its quota holds a place, and can lose it; its confirmation fails."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=3, queue_timeout_seconds=100)
        tasks = await fill(queue, "-aa")
        reservation = queue.reserve("a", None)
        assert queue.waiting == 3
        tasks += await fill(queue, "b")
        with pytest.raises(QueueFull):
            queue.confirm(reservation)
        queue.release(reservation)
        assert await asyncio.gather(*tasks) == ["OK"] * 4

    run_virtual(main())


def test_closed_queue_rejects_reservations() -> None:
    """A reservation that is confirmed after the queue was closed fails with ShuttingDown, and leaves nothing."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=3, queue_timeout_seconds=100)
        tasks = await fill(queue, "-aaa")
        reservation = queue.reserve("b", None)
        queue.release(queue.reserve("b", None))
        queue.close()
        with pytest.raises(ShuttingDown):
            queue.confirm(reservation)
        assert await asyncio.gather(*tasks) == ["OK", *["SHUTTING_DOWN"] * 3]
        assert (queue.running, queue.waiting) == (0, 0)

    run_virtual(main())


def test_free_slot_is_not_granted_to_a_reservation() -> None:
    """A request that awaits its quota does not hold up a request behind it; it keeps its place."""

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=1, queue_timeout_seconds=100)
        first = queue.reserve("a", None)
        second = queue.enter("a", None)
        with pytest.raises(QueueFull):
            queue.reserve("a", None)
        async with queue.slot(second, None) as lease:
            assert lease.queue_seconds == 0
            queue.confirm(first)
        async with queue.slot(first, None):
            assert queue.waiting == 0
        assert queue.running == 0

    run_virtual(main())
