"""Single flight, in virtual time, with generations that wait in the real line."""

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.errors import InternalError, QueueFull, QueueWaitTooLong, ServiceError
from llama2_server.generation.coalescing import Coalescer

WORDS = ["Once ", "upon ", "a ", "time"]


class TalkingGeneration:
    """Says a word a second in a slot, as a generation would, then ends or fails."""

    def __init__(self, slots: RequestQueue, error: ServiceError | None = None) -> None:
        self.said: list[str] = []
        self.left = 0
        self.stopped_at: float | None = None
        self._error = error
        self._result: str | ServiceError | None = None
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._run(slots))

    @property
    def complete(self) -> bool:
        return isinstance(self._result, str)

    @property
    def failed(self) -> bool:
        return isinstance(self._result, ServiceError)

    async def wait(self) -> None:
        await asyncio.wait([self._task])

    def cancel(self) -> None:
        self.left += 1
        self._task.cancel()

    async def deltas(self) -> AsyncIterator[str]:
        read = 0
        while True:
            if read < len(self.said):
                read += 1
                yield self.said[read - 1]
            elif isinstance(self._result, ServiceError):
                raise self._result
            elif self._result is not None:
                return
            else:
                async with self._news:
                    await self._news.wait()

    async def _run(self, slots: RequestQueue) -> None:
        try:
            async with slots.slot("a", None):
                for word in WORDS:
                    await asyncio.sleep(1)
                    self.said.append(word)
                    await self._announce()
            if self._error is not None:
                raise self._error
            self._result = "".join(self.said)
        except ServiceError as error:
            self._result = error
        except asyncio.CancelledError:
            self._result = InternalError()
            self.stopped_at = now()
            raise
        finally:
            await self._announce()

    async def _announce(self) -> None:
        async with self._news:
            self._news.notify_all()


class Service:
    """What the servicer does, without gRPC."""

    def __init__(self, keep: Callable[[], None] = lambda: None) -> None:
        self.slots = RequestQueue(1, max_queue_size=10, queue_timeout_seconds=1000)
        self.made: list[TalkingGeneration] = []
        self.kept: dict[str, str] = {}
        self.error: ServiceError | None = None
        self._keep = keep
        self.flights: Coalescer[str, TalkingGeneration] = Coalescer(self._on_complete)

    async def call(self, key: str | None = "key", deadline: float | None = None) -> list[tuple[float, str]]:
        """One call that is cancelled at its deadline; returns when it heard what, from its own beginning."""
        begun = now()
        async with asyncio.timeout_at(deadline):
            with self.flights.subscribe(key, self.make) as seat:
                return [(now() - begun, delta) async for delta in seat.generation.deltas()]

    def make(self) -> TalkingGeneration:
        generation = TalkingGeneration(self.slots, self.error)
        self.made.append(generation)
        return generation

    async def _on_complete(self, key: str, generation: TalkingGeneration) -> None:
        self._keep()
        await asyncio.sleep(0.1)
        self.kept[key] = "".join(generation.said)


def now() -> float:
    return asyncio.get_running_loop().time()


def words(heard: list[tuple[float, str]]) -> list[str]:
    return [word for _, word in heard]


def test_identical_requests_share_one_generation() -> None:
    """100 racers: one generation, one slot, the same text for all, and one entry in the cache."""

    async def main() -> None:
        service = Service()
        replies = await asyncio.gather(*(service.call() for _ in range(100)))
        assert all(words(reply) == WORDS for reply in replies)
        assert len(service.made) == 1
        await asyncio.sleep(1)
        assert service.kept == {"key": "Once upon a time"}
        assert (len(service.flights), service.made[0].left) == (0, 0)

    run_virtual(main())


def test_follower_streams_from_the_first_token_on() -> None:
    """Who comes late hears at once what was said, then the rest as it comes."""

    async def main() -> None:
        service = Service()
        leader = asyncio.create_task(service.call())
        await asyncio.sleep(2.5)
        assert await service.call() == [(0, "Once "), (0, "upon "), (0.5, "a "), (1.5, "time")]
        assert await leader == [(1, "Once "), (2, "upon "), (3, "a "), (4, "time")]

    run_virtual(main())


def test_different_requests_do_not_share() -> None:
    """Another key is another generation; so is every call without a key, and it is not kept."""

    async def main() -> None:
        service = Service()
        await asyncio.gather(*(service.call(key) for key in ("one", "two", None, None)))
        await asyncio.sleep(1)
        assert len(service.made) == 4
        assert service.kept.keys() == {"one", "two"}

    run_virtual(main())


def test_seat_tells_who_began() -> None:
    """One of the readers began the generation, the others share it."""

    async def main() -> None:
        flights = Service().flights
        slots = RequestQueue(1, max_queue_size=1, queue_timeout_seconds=1)
        with (
            flights.subscribe("key", lambda: TalkingGeneration(slots)) as first,
            flights.subscribe("key", lambda: TalkingGeneration(slots)) as second,
            flights.subscribe(None, lambda: TalkingGeneration(slots)) as alone,
        ):
            assert (first.shared, second.shared, alone.shared) == (False, True, False)
            assert second.generation is first.generation is not alone.generation

    run_virtual(main())


def test_generation_goes_on_without_its_leader() -> None:
    """The leader's client hangs up: the follower hears everything, and the reply is kept."""

    async def main() -> None:
        service = Service()
        leader = asyncio.create_task(service.call())
        await asyncio.sleep(1.5)
        follower = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        leader.cancel()
        assert words(await follower) == WORDS
        await asyncio.sleep(1)
        assert service.kept.keys() == {"key"}

    run_virtual(main())


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_generation_stops_with_its_last_reader(first_to_leave: int) -> None:
    """Whoever leaves last stops it, once and at that moment; its slot is free, and nothing is kept."""

    async def main() -> None:
        service = Service()
        readers = [asyncio.create_task(service.call()) for _ in range(2)]
        await asyncio.sleep(1.5)
        readers.pop(first_to_leave).cancel()
        await asyncio.sleep(1)
        assert service.made[0].left == 0
        readers.pop().cancel()
        await asyncio.sleep(1)
        assert (service.made[0].left, service.made[0].stopped_at) == (1, 2.5)
        assert (service.slots.running, len(service.flights), service.kept) == (0, 0, {})

    run_virtual(main())


def test_stopped_generation_is_not_shared() -> None:
    """Who comes in the very moment after the last reader left gets a generation of its own."""

    async def main() -> None:
        service = Service()
        with service.flights.subscribe("key", service.make):
            pass
        reply = asyncio.create_task(service.call())
        assert words(await reply) == WORDS
        assert len(service.made) == 2
        await asyncio.sleep(1)
        assert service.kept.keys() == {"key"}

    run_virtual(main())


def test_end_of_a_stopped_generation_leaves_its_successor_alone() -> None:
    """A generation that is slow to stop does not take a later one of the same key off the map."""

    async def main() -> None:
        service = Service()
        first = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        first.cancel()
        second = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        third = asyncio.create_task(service.call())
        assert words(await second) == words(await third) == WORDS
        assert len(service.made) == 2

    run_virtual(main())


def test_failure_reaches_all_readers_and_nobody_later() -> None:
    """Everybody on board hears of it; the next call, even in the same moment, starts anew; nothing is kept."""

    async def main() -> None:
        service = Service()
        service.error = InternalError()

        async def call_again_at_once() -> list[tuple[float, str]]:
            with pytest.raises(InternalError):
                await service.call()
            service.error = None
            return await service.call()

        replies = await asyncio.gather(*(call_again_at_once() for _ in range(3)))
        assert all(words(reply) == WORDS for reply in replies)
        assert len(service.made) == 2
        await asyncio.sleep(1)
        assert service.kept.keys() == {"key"}

    run_virtual(main())


def test_reply_can_be_joined_until_it_is_kept() -> None:
    """Between the last token and the entry in the cache a call still finds the reply, and waits for nothing."""

    async def main() -> None:
        service = Service()
        await service.call()
        assert service.kept == {}
        assert await service.call() == [(0, word) for word in WORDS]
        await asyncio.sleep(1)
        assert (len(service.made), set(service.kept), len(service.flights)) == (1, {"key"}, 0)

    run_virtual(main())


def test_deadline_of_a_follower_ends_the_follower_only() -> None:
    """The leader and the generation do not notice."""

    async def main() -> None:
        service = Service()
        leader = asyncio.create_task(service.call())
        await asyncio.sleep(0.5)
        with pytest.raises(TimeoutError):
            await service.call(deadline=1.5)
        assert now() == 1.5
        assert words(await leader) == WORDS

    run_virtual(main())


def test_deadline_of_the_leader_in_line_does_not_doom_followers() -> None:
    """The leader's time is over while the generation waits for its slot: it keeps its place for those with more."""

    async def main() -> None:
        service = Service()
        other = asyncio.create_task(service.call("other"))
        await asyncio.sleep(0.5)
        leader = asyncio.create_task(service.call(deadline=2))
        await asyncio.sleep(0.5)
        follower = asyncio.create_task(service.call(deadline=20))
        latecomer = asyncio.create_task(service.call("late"))
        with pytest.raises(TimeoutError):
            await leader
        assert now() == 2
        await follower
        assert now() == 8  # after `other`, before `late`
        await latecomer
        await other

    run_virtual(main())


def test_deadline_of_the_last_reader_in_line_empties_the_line() -> None:
    """With nobody left to read it, a generation leaves the line and never gets a slot."""

    async def main() -> None:
        service = Service()
        other = asyncio.create_task(service.call("other"))
        await asyncio.sleep(0.5)
        calls = [asyncio.create_task(service.call(deadline=deadline)) for deadline in (1, 2)]
        await asyncio.sleep(1)
        assert service.slots.waiting == 1
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0)
        assert (service.slots.waiting, now()) == (0, 2)
        await other
        assert service.made[1].said == []

    run_virtual(main())


def test_refusal_at_once_begins_nothing() -> None:
    """What `make` refuses, the caller hears, and the next caller is asked anew."""

    async def main() -> None:
        service = Service()

        def refuse() -> TalkingGeneration:
            raise QueueFull("full", 1)

        with pytest.raises(QueueFull), service.flights.subscribe("key", refuse):
            pass
        assert len(service.flights) == 0
        assert words(await service.call()) == WORDS

    run_virtual(main())


def test_refusal_in_line_reaches_all_readers() -> None:
    """The line's own limit holds for the generation: nobody on board waits longer than that."""

    async def main() -> None:
        service = Service()
        service.slots = RequestQueue(1, max_queue_size=10, queue_timeout_seconds=2)
        other = asyncio.create_task(service.call("other"))
        await asyncio.sleep(0)
        results = await asyncio.gather(*(service.call() for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [QueueWaitTooLong] * 3
        assert now() == 2
        await other

    run_virtual(main())


def test_fault_of_the_hook_is_nobodys_fault(caplog: pytest.LogCaptureFixture) -> None:
    """A reply that cannot be kept is a reply; the fault is logged, and the next call starts anew."""

    async def main() -> None:
        def fail() -> None:
            raise OSError("no space")

        service = Service(fail)
        assert words(await service.call()) == WORDS
        await asyncio.sleep(1)
        assert len(service.flights) == 0
        assert words(await service.call()) == WORDS
        await service.flights.close()

    with caplog.at_level(logging.ERROR):
        run_virtual(main())
    assert [record.message for record in caplog.records] == ["storing a complete reply failed"] * 2


def test_close_waits_for_replies_that_are_being_kept() -> None:
    """A drain loses no complete reply, and does not wait for one that is not."""

    async def main() -> None:
        service = Service()
        await service.call("whole")
        rest = asyncio.create_task(service.call("half"))
        await asyncio.sleep(0.05)
        await service.flights.close()
        assert service.kept.keys() == {"whole"}
        assert len(service.flights) == 0
        rest.cancel()
        with suppress(asyncio.CancelledError):
            await rest

    run_virtual(main())


def test_nothing_is_left_behind() -> None:
    """Whatever became of it, an ended generation is held by nobody."""

    async def main() -> None:
        service = Service()
        await service.call("whole")
        service.error = InternalError()
        with pytest.raises(InternalError):
            await service.call("failed")
        service.error = None
        with pytest.raises(TimeoutError):
            await service.call("cancelled", deadline=now() + 1)
        await asyncio.sleep(1)
        seen = [weakref.ref(generation) for generation in service.made]
        service.made.clear()
        gc.collect()
        assert [ref() for ref in seen] == [None] * 3

    run_virtual(main())
