"""Deadlines, rejections and errors of calls that share a generation; in virtual time."""

import asyncio
import logging
from contextlib import suppress

import pytest
from tests.support.virtual_time import run_virtual
from tests.unit.generation.scripted_generation import WORDS, ScriptedGeneration, SharingService, now, words

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.errors import InternalError, QueueFull, QueueWaitTooLong


def test_error_reaches_all_readers_and_no_later_call() -> None:
    """All readers get the error, and nothing is stored; even a retry in the same instant starts a new generation."""

    async def main() -> None:
        service = SharingService()
        service.error = InternalError()

        async def fail_then_retry_at_once() -> list[tuple[float, str]]:
            with pytest.raises(InternalError):
                await service.call()
            service.error = None
            return await service.call()

        replies = await asyncio.gather(*(fail_then_retry_at_once() for _ in range(3)))
        assert all(words(reply) == WORDS for reply in replies)
        assert len(service.generations) == 2
        await asyncio.sleep(1)
        assert service.stored.keys() == {"key"}

    run_virtual(main())


def test_deadline_of_a_later_call_ends_only_that_call() -> None:
    """The generation and the call that started it continue."""

    async def main() -> None:
        service = SharingService()
        first = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        with pytest.raises(TimeoutError):
            await service.call(deadline=1.5)
        assert now() == 1.5
        assert words(await first) == WORDS

    run_virtual(main())


def test_deadline_of_the_first_call_keeps_the_place_in_the_queue() -> None:
    """If the first call's deadline passes in the queue, the generation stays at its position for the other calls."""

    async def main() -> None:
        service = SharingService()
        other = asyncio.create_task(service.call("other"))
        await asyncio.sleep(0.5)
        first = asyncio.create_task(service.call(deadline=2))
        await asyncio.sleep(0.5)
        second = asyncio.create_task(service.call(deadline=20))
        late = asyncio.create_task(service.call("late"))
        with pytest.raises(TimeoutError):
            await first
        assert now() == 2
        await second
        assert now() == 8  # after `other`, before `late`
        await late
        await other

    run_virtual(main())


def test_deadline_of_the_last_reader_removes_the_generation_from_the_queue() -> None:
    """A queued generation without readers leaves the queue and never gets a slot."""

    async def main() -> None:
        service = SharingService()
        other = asyncio.create_task(service.call("other"))
        await asyncio.sleep(0.5)
        calls = [asyncio.create_task(service.call(deadline=deadline)) for deadline in (1, 2)]
        await asyncio.sleep(1)
        assert service.queue.waiting == 1
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0)
        assert (service.queue.waiting, now()) == (0, 2)
        await other
        assert service.generations[1].words == []

    run_virtual(main())


def test_rejected_start_leaves_no_generation() -> None:
    """An error of `start` reaches the caller, and the next call starts a generation."""

    async def main() -> None:
        service = SharingService()

        def reject() -> ScriptedGeneration:
            raise QueueFull("full", 1)

        with pytest.raises(QueueFull), service.coalescer.subscribe("key", reject):
            pass
        assert len(service.coalescer) == 0
        assert words(await service.call()) == WORDS

    run_virtual(main())


def test_rejection_in_the_queue_reaches_all_readers() -> None:
    """The queue timeout applies to the generation, so no reader waits longer."""

    async def main() -> None:
        service = SharingService()
        service.queue = RequestQueue(1, max_queue_size=10, queue_timeout_seconds=2)
        other = asyncio.create_task(service.call("other"))
        await asyncio.sleep(0)
        results = await asyncio.gather(*(service.call() for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [QueueWaitTooLong] * 3
        assert now() == 2
        await other

    run_virtual(main())


def test_error_while_storing_does_not_fail_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """The call gets its reply and the error is logged; the next call starts a new generation."""

    async def main() -> None:
        def fail() -> None:
            raise OSError("no space")

        service = SharingService(fail)
        assert words(await service.call()) == WORDS
        await asyncio.sleep(1)
        assert len(service.coalescer) == 0
        assert words(await service.call()) == WORDS
        await service.coalescer.close()

    with caplog.at_level(logging.ERROR):
        run_virtual(main())
    assert [record.message for record in caplog.records] == ["storing a complete reply failed"] * 2


def test_close_waits_until_complete_replies_are_stored() -> None:
    """A drain loses no complete reply, and does not wait for an incomplete one."""

    async def main() -> None:
        service = SharingService()
        await service.call("complete")
        incomplete = asyncio.create_task(service.call("incomplete"))
        await asyncio.sleep(0.05)
        await service.coalescer.close()
        assert service.stored.keys() == {"complete"}
        assert len(service.coalescer) == 0
        incomplete.cancel()
        with suppress(asyncio.CancelledError):
            await incomplete

    run_virtual(main())
