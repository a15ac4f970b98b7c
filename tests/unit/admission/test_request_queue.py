"""The request queue, in virtual time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.retry_times import CallIdentity
from llama2_server.errors import DeadlineExceeded, QueueFull, QueueWaitTooLong, ShuttingDown


def make_queue(slots: int = 1, max_queue_size: int = 100, queue_timeout_seconds: float = 1000) -> RequestQueue:
    return RequestQueue(slots, max_queue_size=max_queue_size, queue_timeout_seconds=queue_timeout_seconds)


async def hold_slot(
    queue: RequestQueue,
    account_id: str,
    seconds: float,
    started: list[str] | None = None,
    deadline: float | None = None,
) -> float:
    """Hold a slot for a time, and return the queue time; add the account to `started` when it gets the slot."""
    async with queue.slot(queue.enter(account_id, deadline), deadline) as lease:
        if started is not None:
            started.append(account_id)
        await asyncio.sleep(seconds)
        return lease.queue_seconds


async def start_in_order(requests: list[Coroutine[Any, Any, float]]) -> list[asyncio.Task[float]]:
    """Start requests one after another; each is in the queue before the next one starts."""
    tasks = []
    for request in requests:
        tasks.append(asyncio.create_task(request))
        await asyncio.sleep(0)
    return tasks


def test_every_queue_time_is_reported() -> None:
    """`on_waited` is called for each served or expired request, also without a wait, but not for a rejected one."""
    waits: list[float] = []

    async def main() -> None:
        queue = RequestQueue(1, max_queue_size=2, queue_timeout_seconds=1000, on_waited=waits.append)
        tasks = await start_in_order(
            [hold_slot(queue, "a", 5), hold_slot(queue, "a", 5), hold_slot(queue, "b", 5, deadline=3)]
        )
        with pytest.raises(QueueFull):
            await hold_slot(queue, "c", 5)
        await asyncio.gather(*tasks, return_exceptions=True)

    run_virtual(main())
    assert waits == [0, 3, 5]


def test_a_full_queue_tells_for_which_calls() -> None:
    """The error has the number of calls that wait; the rest of the queue can be kept for calls that return."""

    async def main() -> None:
        queue = make_queue(max_queue_size=2)
        await hold_slot(queue, "a", 1)
        running = asyncio.create_task(hold_slot(queue, "a", 9))
        for number in (1, 2):
            queue.add_retry_time("b", CallIdentity(number), 0, 600, keeps_order=False)
        await asyncio.sleep(3)
        with pytest.raises(QueueFull, match=r"full \(0 waiting, and the rest is kept for calls that return\)"):
            queue.enter("c", None)
        await asyncio.sleep(5)  # the calls have not returned
        tasks = await start_in_order([hold_slot(queue, "c", 1), hold_slot(queue, "c", 1)])
        with pytest.raises(QueueFull, match=r"full \(2 waiting\)"):
            queue.enter("c", None)
        await asyncio.gather(running, *tasks)

    run_virtual(main())


def test_free_slot_is_granted_at_once() -> None:
    """With a free slot, no request waits."""

    async def main() -> None:
        queue = make_queue(2)
        assert sum(await asyncio.gather(hold_slot(queue, "a", 5), hold_slot(queue, "b", 5))) == 0
        assert (queue.running, queue.waiting) == (0, 0)

    run_virtual(main())


def test_never_more_requests_than_slots_run() -> None:
    """Of 200 concurrent requests, at most `slots` run at any time, and all of them get a slot."""

    async def main() -> None:
        queue, running, peak = make_queue(3, max_queue_size=200), 0, 0

        async def request(index: int) -> None:
            nonlocal running, peak
            async with queue.slot(queue.enter(f"account{index % 7}", None), None):
                running += 1
                peak = max(peak, running)
                await asyncio.sleep(1 + index % 3)
                running -= 1

        await asyncio.gather(*(request(index) for index in range(200)))
        assert (peak, queue.running, queue.waiting) == (3, 0, 0)

    run_virtual(main())


def test_first_come_first_served_within_an_account() -> None:
    """Requests of one account run in the order of their arrival."""

    async def main() -> None:
        queue = make_queue()
        tasks = await start_in_order([hold_slot(queue, "a", 10) for _ in range(5)])
        assert await asyncio.gather(*tasks) == [0, 10, 20, 30, 40]

    run_virtual(main())


def test_flood_of_one_account_does_not_starve_another() -> None:
    """Round robin: a late request of a quiet account waits for one queued request of the flood, not for all of them."""

    async def main() -> None:
        queue, started = make_queue(), list[str]()
        flood = [hold_slot(queue, "flood", 1, started) for _ in range(6)]
        others = [hold_slot(queue, account_id, 1, started) for account_id in ("quiet", "other")]
        await asyncio.gather(*await start_in_order([*flood, *others]))
        assert started == ["flood", "flood", "quiet", "other", "flood", "flood", "flood", "flood"]

    run_virtual(main())


def test_cancelled_request_leaves_the_queue() -> None:
    """A request that is cancelled in the queue never gets a slot, and later requests move up."""

    async def main() -> None:
        queue, started = make_queue(), list[str]()
        first, second, third = await start_in_order(
            [hold_slot(queue, account_id, 10, started) for account_id in ("first", "second", "third")]
        )
        second.cancel()
        assert list(await asyncio.gather(first, third)) == [0, 10]
        assert second.cancelled()
        assert started == ["first", "third"]

    run_virtual(main())


def test_slot_granted_to_a_just_cancelled_request_goes_to_the_next() -> None:
    """A cancellation in the same instant as the grant neither loses the slot nor runs the request."""

    async def main() -> None:
        queue, started = make_queue(), list[str]()
        release = asyncio.Event()

        async def first() -> None:
            async with queue.slot(queue.enter("first", None), None):
                await release.wait()
            waiter.cancel()  # after the grant, before its task runs

        holder = asyncio.create_task(first())
        await asyncio.sleep(0)
        waiter, last = await start_in_order(
            [hold_slot(queue, "waiter", 1, started), hold_slot(queue, "last", 1, started)]
        )
        release.set()
        await asyncio.wait([holder, waiter, last])
        assert waiter.cancelled()
        assert started == ["last"]
        assert (queue.running, queue.waiting) == (0, 0)

    run_virtual(main())


def test_deadline_passes_in_the_queue() -> None:
    """A request whose deadline passes in the queue ends at that moment with DeadlineExceeded, and leaves the queue."""

    async def main() -> None:
        queue = make_queue()
        holder, waiter = await start_in_order([hold_slot(queue, "a", 10), hold_slot(queue, "b", 1, deadline=4)])
        with pytest.raises(DeadlineExceeded):
            await waiter
        assert asyncio.get_running_loop().time() == 4
        assert queue.waiting == 0
        await holder

    run_virtual(main())


def test_full_queue_rejects_with_the_time_until_it_has_room() -> None:
    """A full queue rejects at once; a retry after the time in the error is accepted if a generation took two means."""

    async def main() -> None:
        queue = make_queue(max_queue_size=1)
        await hold_slot(queue, "a", 10)  # the queue then expects that each request takes 10 s
        tasks = await start_in_order([hold_slot(queue, "a", 20), hold_slot(queue, "a", 10)])
        await asyncio.sleep(3)
        with pytest.raises(QueueFull) as rejected:
            await hold_slot(queue, "b", 1)
        assert rejected.value.retry_after_seconds == pytest.approx(17)
        await asyncio.sleep(rejected.value.retry_after_seconds or 0)
        await asyncio.sleep(0)
        assert await hold_slot(queue, "b", 1) == pytest.approx(10)
        await asyncio.gather(*tasks)

    run_virtual(main())


def test_wait_beyond_the_deadline_is_rejected_at_once() -> None:
    """A request that cannot meet its deadline is rejected on arrival, with a time after which a retry is served."""

    async def main() -> None:
        queue = make_queue()
        await hold_slot(queue, "a", 10)
        tasks = await start_in_order([hold_slot(queue, "a", 10), hold_slot(queue, "a", 10)])
        now = asyncio.get_running_loop().time()
        with pytest.raises(QueueWaitTooLong) as rejected:
            await hold_slot(queue, "b", 1, deadline=now + 4)
        assert asyncio.get_running_loop().time() == now
        # 20 s may become 28 s, and one generation may take 10 s more.
        assert rejected.value.retry_after_seconds == pytest.approx(34)
        await asyncio.sleep(rejected.value.retry_after_seconds or 0)
        deadline = asyncio.get_running_loop().time() + 4.001
        assert await hold_slot(queue, "b", 1, deadline=deadline) <= 4
        await asyncio.gather(*tasks)

    run_virtual(main())


def test_a_yielding_slot_adds_no_wait() -> None:
    """A slot whose holder frees it for another request neither adds to the estimated wait nor fills the queue."""

    async def main() -> None:
        queue = make_queue(max_queue_size=0)
        await hold_slot(queue, "a", 6)
        holder = asyncio.Event()
        queue.on_contention = holder.set
        async with queue.slot(queue.enter("a", None), None) as lease:
            with pytest.raises(QueueFull):
                queue.enter("b", None)
            assert queue.estimated_wait_seconds("b") == 6
            lease.yields = True
            assert queue.estimated_wait_seconds("b") == 0
            waiting = asyncio.create_task(hold_slot(queue, "b", 1, deadline=asyncio.get_running_loop().time() + 1))
            await holder.wait()
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                queue.enter("c", None)
        assert await waiting == 0

    run_virtual(main())


@pytest.mark.parametrize("account_id", ["a", "b", "c", "new"])
def test_estimate_is_the_wait(account_id: str) -> None:
    """If all requests take equally long, the estimate is exactly the later wait, for each account in the round."""

    async def main() -> None:
        queue = make_queue(2)
        await hold_slot(queue, "a", 6)
        tasks = await start_in_order([hold_slot(queue, other, 6) for other in "aabbacaab"])
        await asyncio.sleep(1)
        estimate = queue.estimated_wait_seconds(account_id)
        assert await hold_slot(queue, account_id, 6) == pytest.approx(estimate)
        await asyncio.gather(*tasks)

    run_virtual(main())


def test_longest_wait_is_bounded() -> None:
    """A request that has waited for the queue timeout is rejected, although its estimate was shorter."""

    async def main() -> None:
        queue = make_queue(queue_timeout_seconds=5)
        holder, waiter = await start_in_order([hold_slot(queue, "a", 100), hold_slot(queue, "b", 1)])
        with pytest.raises(QueueWaitTooLong):
            await waiter
        assert asyncio.get_running_loop().time() == 5
        await holder

    run_virtual(main())


def test_close_rejects_queued_requests_and_lets_running_ones_finish() -> None:
    """Queued and new requests end with ShuttingDown; a running request finishes."""

    async def main() -> None:
        queue = make_queue()
        holder, waiter = await start_in_order([hold_slot(queue, "a", 10), hold_slot(queue, "b", 1)])
        queue.close()
        with pytest.raises(ShuttingDown):
            await waiter
        with pytest.raises(ShuttingDown):
            await hold_slot(queue, "c", 1)
        assert await holder == 0

    run_virtual(main())
