"""Identical requests share a generation; in virtual time."""

import asyncio
import gc
import weakref

import pytest
from tests.support.virtual_time import run_virtual
from tests.unit.generation.scripted_generation import WORDS, ScriptedGeneration, SharingService, words

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.errors import InternalError


def test_identical_requests_share_one_generation() -> None:
    """For 100 concurrent calls there is one generation, one slot, one text and one stored reply."""

    async def main() -> None:
        service = SharingService()
        replies = await asyncio.gather(*(service.call() for _ in range(100)))
        assert all(words(reply) == WORDS for reply in replies)
        assert len(service.generations) == 1
        await asyncio.sleep(1)
        assert service.stored == {"key": "Once upon a time"}
        assert (len(service.coalescer), service.generations[0].cancel_calls) == (0, 0)

    run_virtual(main())


def test_later_call_gets_the_reply_from_its_first_token() -> None:
    """A later call gets the existing text at once, and then the rest while it is generated."""

    async def main() -> None:
        service = SharingService()
        first = asyncio.create_task(service.call())
        await asyncio.sleep(2.5)
        assert await service.call() == [(0, "Once "), (0, "upon "), (0.5, "a "), (1.5, "time")]
        assert await first == [(1, "Once "), (2, "upon "), (3, "a "), (4, "time")]

    run_virtual(main())


def test_different_requests_do_not_share() -> None:
    """Each key has a separate generation; so has each call without a key, and its reply is not stored."""

    async def main() -> None:
        service = SharingService()
        await asyncio.gather(*(service.call(key) for key in ("one", "two", None, None)))
        await asyncio.sleep(1)
        assert len(service.generations) == 4
        assert service.stored.keys() == {"one", "two"}

    run_virtual(main())


def test_subscription_shows_which_call_started_the_generation() -> None:
    """`shared` is False for the call that started the generation, and True for the others."""

    async def main() -> None:
        coalescer = SharingService().coalescer
        queue = RequestQueue(1, max_queue_size=1, queue_timeout_seconds=1)
        with (
            coalescer.subscribe("key", lambda: ScriptedGeneration(queue)) as first,
            coalescer.subscribe("key", lambda: ScriptedGeneration(queue)) as second,
            coalescer.subscribe(None, lambda: ScriptedGeneration(queue)) as alone,
        ):
            assert (first.shared, second.shared, alone.shared) == (False, True, False)
            assert second.generation is first.generation is not alone.generation

    run_virtual(main())


def test_generation_continues_without_the_call_that_started_it() -> None:
    """After the first client disconnects, the second gets the whole reply, and the reply is stored."""

    async def main() -> None:
        service = SharingService()
        first = asyncio.create_task(service.call())
        await asyncio.sleep(1.5)
        second = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        first.cancel()
        assert words(await second) == WORDS
        await asyncio.sleep(1)
        assert service.stored.keys() == {"key"}

    run_virtual(main())


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_last_reader_cancels_the_generation(first_to_leave: int) -> None:
    """The end of the last reader cancels the generation once and at once; the slot is free and nothing is stored."""

    async def main() -> None:
        service = SharingService()
        readers = [asyncio.create_task(service.call()) for _ in range(2)]
        await asyncio.sleep(1.5)
        readers.pop(first_to_leave).cancel()
        await asyncio.sleep(1)
        (generation,) = service.generations
        assert generation.cancel_calls == 0
        readers.pop().cancel()
        await asyncio.sleep(1)
        assert (generation.cancel_calls, generation.cancelled_at) == (1, 2.5)
        assert (service.queue.running, len(service.coalescer), service.stored) == (0, 0, {})

    run_virtual(main())


def test_readers_learn_that_others_leave() -> None:
    """Each end of a reader calls the callbacks of the readers that are left."""

    async def main() -> None:
        service = SharingService()
        left: list[int] = []
        with service.coalescer.subscribe("key", service.start) as first:
            first.readers.on_leave.append(lambda: left.append(first.readers.now))
            for _ in range(2):
                with service.coalescer.subscribe("key", service.start):
                    pass
            assert left == [1, 1]

    run_virtual(main())


def test_cancelled_generation_is_not_shared() -> None:
    """A call that arrives immediately after the last reader has left gets a new generation."""

    async def main() -> None:
        service = SharingService()
        with service.coalescer.subscribe("key", service.start):
            pass
        assert words(await service.call()) == WORDS
        assert len(service.generations) == 2
        await asyncio.sleep(1)
        assert service.stored.keys() == {"key"}

    run_virtual(main())


def test_cancelled_generation_does_not_remove_its_successor() -> None:
    """The end of a cancelled generation does not remove a later generation of the same key."""

    async def main() -> None:
        service = SharingService()
        first = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        first.cancel()
        second = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        third = asyncio.create_task(service.call())
        assert words(await second) == words(await third) == WORDS
        assert len(service.generations) == 2

    run_virtual(main())


def test_reply_is_shared_until_it_is_stored() -> None:
    """Between the last token and the cache entry, a call still shares the reply, without a wait."""

    async def main() -> None:
        service = SharingService()
        await service.call()
        assert service.stored == {}
        assert await service.call() == [(0, word) for word in WORDS]
        await asyncio.sleep(1)
        assert (len(service.generations), set(service.stored), len(service.coalescer)) == (1, {"key"}, 0)

    run_virtual(main())


def test_ended_generations_are_released() -> None:
    """No reference to a complete, failed or cancelled generation remains."""

    async def main() -> None:
        service = SharingService()
        await service.call("complete")
        service.error = InternalError()
        with pytest.raises(InternalError):
            await service.call("failed")
        service.error = None
        with pytest.raises(TimeoutError):
            await service.call("cancelled", deadline=asyncio.get_running_loop().time() + 1)
        await asyncio.sleep(1)
        references = [weakref.ref(generation) for generation in service.generations]
        service.generations.clear()
        gc.collect()
        assert [reference() for reference in references] == [None] * 3

    run_virtual(main())
