"""A random history of hundreds of requests against a plain model of what each should cost."""

import random
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.integration.usage.conftest import stored
from tests.support.service import Service, ServiceMaker, server_deadline, until, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.telemetry import Telemetry

REPLY = "Once upon a time, a fox lived by the sea and told the gulls what it had seen."
NEURON_COST = Decimal("0.3672")
GENERATE = "llama2.v1.TextGenerationService/Generate"
STREAM = "llama2.v1.TextGenerationService/GenerateStream"


@dataclass(frozen=True)
class Expected:
    """What the ledger should hold of one request."""

    outcome: str
    input_tokens: int
    output_tokens: int
    cached: bool = False

    @property
    def neurons(self) -> Decimal:
        return Decimal(0) if self.cached else NEURON_COST * (self.input_tokens + self.output_tokens)


@dataclass
class PlainModel:
    """The service, without concurrency, sockets or stores: what it kept, and what it should have recorded."""

    reply_tokens: int
    kept: dict[tuple[str, int], Expected] = field(default_factory=dict)
    records: list[Expected] = field(default_factory=list)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    cache_hits: int = 0
    cache_misses: int = 0

    def looked_in_cache(self, *, hit: bool) -> None:
        """A request asked the response cache."""
        self.cache_hits += hit
        self.cache_misses += not hit

    def completed(self, prompt: str, input_tokens: int, max_tokens: int, *, no_cache: bool) -> Expected:
        """A request that runs to its end, or is served from the cache."""
        key = (prompt, max_tokens)
        self.calls[GENERATE, "OK"] += 1
        if not no_cache:
            self.looked_in_cache(hit=key in self.kept)
        if not no_cache and key in self.kept:
            hit = self.kept[key]
            expected = Expected(hit.outcome, hit.input_tokens, hit.output_tokens, cached=True)
        else:
            ends_by_itself = self.reply_tokens <= max_tokens
            outcome = "END_OF_SEQUENCE" if ends_by_itself else "MAX_TOKENS"
            expected = Expected(outcome, input_tokens, min(self.reply_tokens, max_tokens))
            if not no_cache:
                self.kept[key] = expected
        self.records.append(expected)
        return expected

    def broken_off(self, method: str, code: str, input_tokens: int, output_tokens: int) -> None:
        """A request that did not come to its end: it was new, and looked in the cache in vain."""
        self.calls[method, code] += 1
        self.looked_in_cache(hit=False)
        self.records.append(Expected(code, input_tokens, output_tokens))

    def metrics(self) -> dict[str, float]:
        """What a scrape should show."""
        computed = [one for one in self.records if not one.cached]
        return {
            'tokens_total{type="input"}': sum(one.input_tokens for one in computed),
            'tokens_total{type="output"}': sum(one.output_tokens for one in computed),
            "neurons_total": float(sum((one.neurons for one in self.records), Decimal(0))),
            "response_cache_hits_total": self.cache_hits,
            "response_cache_misses_total": self.cache_misses,
            "queue_time_seconds_count": len(computed),
            "time_to_first_token_seconds_count": sum(one.output_tokens > 0 for one in computed),
            "time_per_output_token_seconds_count": sum(one.output_tokens > 1 for one in computed),
            **{f'requests_total{{code="{code}",method="{method}"}}': n for (method, code), n in self.calls.items()},
        }


class History:
    """Makes one request after another, each to its end before the next, and tells the plain model."""

    def __init__(self, service: Service, metrics: Metrics, chance: random.Random) -> None:
        self.service = service
        self.metrics = metrics
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
        assert (Decimal(usage.neurons), reply.completion.cached) == (expected.neurons, expected.cached)
        self.answers[reply.completion.request_id] = expected

    async def cancel(self) -> None:
        """A request that is given up after some tokens; the step under way is still computed, and counts."""
        prompt, read = self.new_prompt(), self.chance.randrange(1, 5)
        self.service.model.gate()
        self.service.model.allow(read)
        call = self.service.text.GenerateStream(pb.GenerateRequest(prompt=prompt))
        await call.read()
        await self.service.model.wait_until_blocked(read)
        call.cancel()
        await self.settle(STREAM, "CANCELLED")
        self.model.broken_off(STREAM, "CANCELLED", await self.tokens(prompt), read + 1)

    async def expire(self) -> None:
        """A request whose deadline passes while the model is in a step."""
        prompt = self.new_prompt()
        self.service.model.gate()
        with pytest.raises(grpc.aio.AioRpcError) as expired:
            await self.service.text.Generate(pb.GenerateRequest(prompt=prompt), metadata=server_deadline(300))
        assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await self.settle(GENERATE, "DEADLINE_EXCEEDED")
        self.model.broken_off(GENERATE, "DEADLINE_EXCEEDED", await self.tokens(prompt), 1)

    async def fail(self) -> None:
        """A request that the engine fails: nothing was computed."""
        self.service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await self.service.text.Generate(pb.GenerateRequest(prompt=self.new_prompt()))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        self.service.model.failure = None
        self.model.broken_off(GENERATE, "INTERNAL", 0, 0)

    async def refuse(self) -> None:
        """An invalid request is not admitted: it leaves no record."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.service.text.Generate(pb.GenerateRequest(prompt="x", top_p=2))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        self.model.calls[GENERATE, "INVALID_ARGUMENT"] += 1

    async def settle(self, method: str, code: str) -> None:
        """Let the step under way end, once the server knows that its caller has gone: it has counted the call."""
        labels = {"method": method, "code": code}
        ended = self.model.calls[method, code] + 1
        await until(lambda: self.metrics.registry.get_sample_value("llama2_requests_total", labels) == ended)
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
    """After 200 random requests ledger, replies' usage, metrics and the plain model agree to the last digit."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))
    metrics = Metrics(CollectorRegistry())
    async with serve_scripted(REPLY, card=card, telemetry=Telemetry(metrics)) as service:
        history = History(service, metrics, random.Random(seed))
        for _ in range(200):
            await history.step()
    records = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
    found = Counter((record.outcome, record.input_tokens, record.output_tokens, record.cached) for record in records)
    expected = Counter((one.outcome, one.input_tokens, one.output_tokens, one.cached) for one in history.model.records)
    assert found == expected
    assert sum((record.neurons for record in records), Decimal(0)) == sum(one.neurons for one in history.model.records)
    by_id = {record.request_id: record for record in records}
    for request_id, one in history.answers.items():
        assert (by_id[request_id].neurons, by_id[request_id].outcome) == (one.neurons, one.outcome)
    assert counted(metrics, *history.model.metrics()) == history.model.metrics()


def counted(metrics: Metrics, *series: str) -> dict[str, float]:
    """The values of series, written as in the text format without the common prefix."""
    lines = (line.rpartition(" ") for line in generate_latest(metrics.registry).decode().splitlines())
    values = {name.removeprefix("llama2_"): float(value) for name, _, value in lines if not name.startswith("#")}
    return {name: values[name] for name in series}
