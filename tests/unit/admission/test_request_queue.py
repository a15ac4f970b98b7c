"""The waiting line, in virtual time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.errors import DeadlineExceeded, QueueFull, QueueWaitTooLong, ShuttingDown


def make_slots(limit: int = 1, max_queue_size: int = 100, queue_timeout_seconds: float = 1000) -> RequestQueue:
    return RequestQueue(limit, max_queue_size=max_queue_size, queue_timeout_seconds=queue_timeout_seconds)


async def hold(
    slots: RequestQueue, account: str, seconds: float, log: list[str] | None = None, deadline: float | None = None
) -> float:
    """Hold a slot for a time; returns the time spent in line."""
    async with slots.slot(account, deadline) as turn:
        if log is not None:
            log.append(account)
        await asyncio.sleep(seconds)
        return turn.queue_seconds


async def in_order(calls: list[Coroutine[Any, Any, float]]) -> list[asyncio.Task[float]]:
    """Start calls one after another, each in line before the next comes."""
    tasks = []
    for call in calls:
        tasks.append(asyncio.create_task(call))
        await asyncio.sleep(0)
    return tasks


def test_every_wait_is_told() -> None:
    """Who waited hears nothing of it, but the observer does: for a slot, in vain, and not at all."""
    waits: list[float] = []

    async def main() -> None:
        slots = RequestQueue(1, max_queue_size=2, queue_timeout_seconds=1000, on_waited=waits.append)
        calls = [hold(slots, "a", 5), hold(slots, "a", 5), hold(slots, "b", 5, deadline=3)]
        tasks = await in_order(calls)
        with pytest.raises(QueueFull):
            await hold(slots, "c", 5)
        await asyncio.gather(*tasks, return_exceptions=True)

    run_virtual(main())
    assert waits == [0, 3, 5]


def test_free_slot_is_given_at_once() -> None:
    """With a free slot nobody waits."""

    async def main() -> None:
        slots = make_slots(2)
        assert sum(await asyncio.gather(hold(slots, "a", 5), hold(slots, "b", 5))) == 0
        assert (slots.running, slots.waiting) == (0, 0)

    run_virtual(main())


def test_never_more_than_the_limit_at_once() -> None:
    """Of 200 concurrent calls exactly `limit` run at any time, and all of them get their turn."""

    async def main() -> None:
        slots, running, peak = make_slots(3, max_queue_size=200), 0, 0

        async def call(index: int) -> None:
            nonlocal running, peak
            async with slots.slot(f"account{index % 7}", None):
                running += 1
                peak = max(peak, running)
                await asyncio.sleep(1 + index % 3)
                running -= 1

        await asyncio.gather(*(call(index) for index in range(200)))
        assert (peak, slots.running, slots.waiting) == (3, 0, 0)

    run_virtual(main())


def test_first_come_first_served_within_an_account() -> None:
    """Calls of one account run in the order of their arrival."""

    async def main() -> None:
        slots = make_slots()
        tasks = await in_order([hold(slots, "a", 10) for _ in range(5)])
        assert await asyncio.gather(*tasks) == [0, 10, 20, 30, 40]

    run_virtual(main())


def test_flood_of_one_account_does_not_starve_another() -> None:
    """Round robin: a late call of a quiet account waits for one turn of the flood, not for all of it."""

    async def main() -> None:
        slots, log = make_slots(), list[str]()
        flood = [hold(slots, "flood", 1, log) for _ in range(6)]
        tasks = await in_order([*flood, hold(slots, "quiet", 1, log), hold(slots, "other", 1, log)])
        await asyncio.gather(*tasks)
        assert log == ["flood", "flood", "quiet", "other", "flood", "flood", "flood", "flood"]

    run_virtual(main())


def test_cancelled_call_leaves_the_line() -> None:
    """A call that is cancelled in line gives its place up and never gets a slot."""

    async def main() -> None:
        slots, log = make_slots(), list[str]()
        first, second, third = await in_order([hold(slots, name, 10, log) for name in ("first", "second", "third")])
        second.cancel()
        assert list(await asyncio.gather(first, third)) == [0, 10]
        assert second.cancelled()
        assert log == ["first", "third"]

    run_virtual(main())


def test_slot_granted_to_a_call_just_cancelled_goes_on() -> None:
    """A cancel in the same instant as the grant neither loses the slot nor runs the call."""

    async def main() -> None:
        slots, log = make_slots(), list[str]()
        release = asyncio.Event()

        async def first() -> None:
            async with slots.slot("first", None):
                await release.wait()
            waiter.cancel()  # before it could wake up with the slot

        holder = asyncio.create_task(first())
        await asyncio.sleep(0)
        waiter, last = await in_order([hold(slots, "waiter", 1, log), hold(slots, "last", 1, log)])
        release.set()
        await asyncio.wait([holder, waiter, last])
        assert waiter.cancelled()
        assert log == ["last"]
        assert (slots.running, slots.waiting) == (0, 0)

    run_virtual(main())


def test_deadline_passes_in_line() -> None:
    """A call whose deadline passes in line ends then, with DeadlineExceeded, and leaves the line."""

    async def main() -> None:
        slots = make_slots()
        holder, waiter = await in_order([hold(slots, "a", 10), hold(slots, "b", 1, deadline=4)])
        with pytest.raises(DeadlineExceeded):
            await waiter
        assert asyncio.get_running_loop().time() == 4
        assert slots.waiting == 0
        await holder

    run_virtual(main())


def test_full_line_refuses_with_the_time_of_the_next_place() -> None:
    """A full line refuses at once; a retry after the time that it names finds a place."""

    async def main() -> None:
        slots = make_slots(max_queue_size=1)
        await hold(slots, "a", 10)  # the line learns that a turn takes 10 s
        tasks = await in_order([hold(slots, "a", 10), hold(slots, "a", 10)])
        await asyncio.sleep(3)
        with pytest.raises(QueueFull) as refused:
            await hold(slots, "b", 1)
        assert refused.value.retry_after_seconds == pytest.approx(7)
        await asyncio.sleep(refused.value.retry_after_seconds or 0)
        await asyncio.sleep(0)
        assert await hold(slots, "b", 1) == pytest.approx(10)
        await asyncio.gather(*tasks)

    run_virtual(main())


def test_wait_beyond_the_deadline_is_refused_at_once() -> None:
    """A hopeless deadline is refused on arrival, with a time after which the same call would be served."""

    async def main() -> None:
        slots = make_slots()
        await hold(slots, "a", 10)
        tasks = await in_order([hold(slots, "a", 10), hold(slots, "a", 10)])
        now = asyncio.get_running_loop().time()
        with pytest.raises(QueueWaitTooLong) as refused:
            await hold(slots, "b", 1, deadline=now + 4)
        assert asyncio.get_running_loop().time() == now
        assert refused.value.retry_after_seconds == pytest.approx(16)
        await asyncio.sleep(refused.value.retry_after_seconds or 0)
        assert await hold(slots, "b", 1, deadline=asyncio.get_running_loop().time() + 4.001) == pytest.approx(4)
        await asyncio.gather(*tasks)

    run_virtual(main())


@pytest.mark.parametrize("account", ["a", "b", "c", "new"])
def test_estimate_is_the_wait(account: str) -> None:
    """With equal turns the estimate is exactly the time that the call then waits, for each account in the round."""

    async def main() -> None:
        slots = make_slots(2)
        await hold(slots, "a", 6)
        tasks = await in_order([hold(slots, name, 6) for name in "aabbacaab"])
        await asyncio.sleep(1)
        estimate = slots.estimated_wait_seconds(account)
        assert await hold(slots, account, 6) == pytest.approx(estimate)
        await asyncio.gather(*tasks)

    run_virtual(main())


def test_longest_wait_is_bounded() -> None:
    """A call that has waited for the line's limit is refused, though its estimate had promised better."""

    async def main() -> None:
        slots = make_slots(queue_timeout_seconds=5)
        holder, waiter = await in_order([hold(slots, "a", 100), hold(slots, "b", 1)])
        with pytest.raises(QueueWaitTooLong):
            await waiter
        assert asyncio.get_running_loop().time() == 5
        await holder

    run_virtual(main())


def test_close_refuses_the_line_and_lets_the_running_finish() -> None:
    """ShuttingDown: who waits and who comes is told so; who runs goes on."""

    async def main() -> None:
        slots = make_slots()
        holder, waiter = await in_order([hold(slots, "a", 10), hold(slots, "b", 1)])
        slots.close()
        with pytest.raises(ShuttingDown):
            await waiter
        with pytest.raises(ShuttingDown):
            await hold(slots, "c", 1)
        assert await holder == 0

    run_virtual(main())
