"""CountTokens: the price, the quota and the queue time that a call would meet now."""

from pathlib import Path

import pytest
from tests.support.deadlines import LoopClock
from tests.support.servers.redis_server import running_redis
from tests.support.service import ServiceMaker, hold_slot, remaining_text, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute


@pytest.fixture
def card(demo_card: ModelCard) -> ModelCard:
    """Return the demo card with a quota of three requests, and without a response cache."""
    quota = RequestsPerMinute(default=3, accounts={})
    return with_config(demo_card, infer_response_cache=None, max_requests_per_min=quota)


async def test_the_price_is_that_of_the_longest_reply(serve_scripted: ServiceMaker, card: ModelCard) -> None:
    """A reply that reaches `max_tokens` costs exactly the forecast; without the field, the card's default counts."""
    async with serve_scripted("Once upon a time.", card=card, ends=False) as service:
        for max_tokens in (9, None):
            count = await service.text.CountTokens(pb.CountTokensRequest(prompt="a story", max_tokens=max_tokens))
            request = pb.GenerateRequest(prompt="a story", max_tokens=max_tokens)
            usage = (await service.text.Generate(request)).completion.usage
            assert usage.output_tokens == (max_tokens or card.default_max_tokens)
            assert count.max_neurons == usage.neurons
        too_long = await service.text.CountTokens(pb.CountTokensRequest(prompt="7 " * 1500))
    assert too_long.max_output_tokens == 0
    assert not too_long.HasField("max_neurons")


async def test_the_quota_is_read_and_not_used(serve_scripted: ServiceMaker, card: ModelCard) -> None:
    """The forecast counts down with the calls that generate, not with its own calls."""
    request, left = pb.CountTokensRequest(prompt="a story"), []
    async with serve_scripted(card=card) as service:
        for _ in range(4):
            left += [(await service.text.CountTokens(request)).requests_left for _ in range(3)]
            if left[-1]:
                await service.text.Generate(pb.GenerateRequest(prompt="a story"))
    assert left == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]


async def test_the_queue_time_is_estimated(serve_scripted: ServiceMaker, clock: LoopClock) -> None:
    """It is 0 while a slot is free. Otherwise it is the mean time of a slot, less what the running call has used."""
    async with serve_scripted() as service:
        count = await service.text.CountTokens(pb.CountTokensRequest(prompt="a story"))
        assert count.HasField("estimated_queue_time")
        assert count.estimated_queue_time.ToNanoseconds() == 0
        first = await hold_slot(service)
        clock.advance(10)
        service.model.open_gate()
        await remaining_text(first)
        await hold_slot(service)
        clock.advance(4)
        count = await service.text.CountTokens(pb.CountTokensRequest(prompt="a story"))
        assert 5.5 < count.estimated_queue_time.ToNanoseconds() / 1e9 < 6.5


async def test_a_quota_store_that_does_not_answer(
    serve_scripted: ServiceMaker, card: ModelCard, tmp_path: Path, patient_stores: None
) -> None:
    """The rest of the quota is unset then; everything else is answered, although Generate would be rejected."""
    with running_redis(tmp_path) as redis:
        async with serve_scripted(card=card, redis_url=redis.url) as service:
            assert (await service.text.CountTokens(pb.CountTokensRequest(prompt="a story"))).requests_left == 3
            redis.kill()
            count = await service.text.CountTokens(pb.CountTokensRequest(prompt="a story"))
    assert not count.HasField("requests_left")
    assert count.max_neurons
    assert count.HasField("estimated_queue_time")
