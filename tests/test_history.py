"""A random history of hundreds of requests against a plain model of what each should cost."""

import random
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from tests.ledger.conftest import stored
from tests.service import Service, ServiceMaker, health_stub, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

REPLY = "Once upon a time, a fox lived by the sea and told the gulls what it had seen."
NEURON_COST = Decimal("0.3672")


@dataclass(frozen=True)
class Expected:
    """What the ledger should hold of one request."""

    outcome: str
    input_tokens: int
    output_tokens: int
    served_from_cache: bool = False

    @property
    def neurons(self) -> Decimal:
        return Decimal(0) if self.served_from_cache else NEURON_COST * (self.input_tokens + self.output_tokens)


@dataclass
class PlainModel:
    """The service, without concurrency, sockets or stores: what it kept, and what it should have recorded."""

    reply_tokens: int
    kept: dict[tuple[str, int], Expected] = field(default_factory=dict)
    records: list[Expected] = field(default_factory=list)

    def completed(self, prompt: str, input_tokens: int, max_tokens: int, *, no_cache: bool) -> Expected:
        """A request that runs to its end, or is served from the cache."""
        key = (prompt, max_tokens)
        if not no_cache and key in self.kept:
            hit = self.kept[key]
            expected = Expected(hit.outcome, hit.input_tokens, hit.output_tokens, served_from_cache=True)
        else:
            ends_by_itself = self.reply_tokens <= max_tokens
            outcome = "END_OF_SEQUENCE" if ends_by_itself else "MAX_TOKENS"
            expected = Expected(outcome, input_tokens, min(self.reply_tokens, max_tokens))
            if not no_cache:
                self.kept[key] = expected
        self.records.append(expected)
        return expected


class History:
    """Makes one request after another, each to its end before the next, and tells the plain model."""

    def __init__(self, service: Service, chance: random.Random) -> None:
        self.service = service
        self.chance = chance
        self.model = PlainModel(len(service.model.reply_ids))
        self.fresh = 0
        self.answers: dict[str, Expected] = {}

    async def step(self) -> None:
        """One random request."""
        kinds = [self.complete, self.complete, self.complete, self.cancel, self.expire, self.fail, self.refuse]
        await self.chance.choice(kinds)()

    async def complete(self, prompt: str | None = None) -> None:
        """A request that is let run; some prompts come again and again."""
        prompt, max_tokens = prompt or f"prompt {self.chance.randrange(8)}", self.chance.choice([1, 3, 200])
        no_cache = self.chance.random() < 0.2
        request = pb.GenerateRequest(prompt=prompt, max_tokens=max_tokens, no_cache=no_cache)
        expected = self.model.completed(prompt, await self.tokens(prompt), max_tokens, no_cache=no_cache)
        reply = await self.service.text.Generate(request)
        usage = reply.completion.usage
        assert (usage.input_tokens, usage.output_tokens) == (expected.input_tokens, expected.output_tokens)
        assert (Decimal(usage.neurons), reply.completion.cached) == (expected.neurons, expected.served_from_cache)
        self.answers[reply.completion.request_id] = expected

    async def cancel(self) -> None:
        """A request that is given up after some tokens; the step under way is still computed, and counts."""
        prompt, read = self.new_prompt(), self.chance.randrange(1, 5)
        self.service.model.gate()
        self.service.model.allow(read)
        call = self.service.text.GenerateStream(pb.GenerateRequest(prompt=prompt))
        await call.read()
        await self.service.model.parked(read)
        call.cancel()
        await self.settle()
        self.model.records.append(Expected("CANCELLED", await self.tokens(prompt), read + 1))

    async def expire(self) -> None:
        """A request whose deadline passes while the model is in a step."""
        prompt = self.new_prompt()
        self.service.model.gate()
        with pytest.raises(grpc.aio.AioRpcError) as expired:
            await self.service.text.Generate(pb.GenerateRequest(prompt=prompt), timeout=0.05)
        assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await self.settle()
        self.model.records.append(Expected("DEADLINE_EXCEEDED", await self.tokens(prompt), 1))

    async def fail(self) -> None:
        """A request that the engine fails: nothing was computed."""
        self.service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await self.service.text.Generate(pb.GenerateRequest(prompt=self.new_prompt()))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        self.service.model.failure = None
        self.model.records.append(Expected("INTERNAL", 0, 0))

    async def refuse(self) -> None:
        """An invalid request is not admitted: it leaves no record."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.service.text.Generate(pb.GenerateRequest(prompt="x", top_p=2))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    async def settle(self) -> None:
        """Let the step under way end, once the server knows that its caller has gone."""
        for _ in range(3):
            await health_stub(self.service.channel).Check(health_pb2.HealthCheckRequest())
        self.service.model.open_gate()
        await self.complete(self.new_prompt())  # it waits for the slot to be free

    async def tokens(self, prompt: str) -> int:
        """The input tokens of a prompt."""
        count = await self.service.text.CountTokens(pb.CountTokensRequest(prompt=prompt))
        return count.input_tokens

    def new_prompt(self) -> str:
        """A prompt that was never asked before, nor will be again."""
        self.fresh += 1
        return f"fresh {self.fresh}"


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_history_is_accounted_exactly(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, seed: int
) -> None:
    """After 200 random requests the ledger, the replies' usage and the plain model agree to the last digit."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))
    async with serve_scripted(REPLY, card=card) as service:
        history = History(service, random.Random(seed))
        for _ in range(200):
            await history.step()
    records = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
    found = Counter(
        (record.outcome, record.input_tokens, record.output_tokens, record.served_from_cache) for record in records
    )
    expected = Counter(
        (one.outcome, one.input_tokens, one.output_tokens, one.served_from_cache) for one in history.model.records
    )
    assert found == expected
    assert sum((record.neurons for record in records), Decimal(0)) == sum(one.neurons for one in history.model.records)
    by_id = {record.request_id: record for record in records}
    for request_id, one in history.answers.items():
        assert (by_id[request_id].neurons, by_id[request_id].outcome) == (one.neurons, one.outcome)
