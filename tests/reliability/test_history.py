"""A random history of hundreds of requests, checked against a simple model of the costs of each request."""

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
from tests.support.deadlines import CallDeadlines, server_deadline
from tests.support.service import Service, ServiceMaker, until, with_config

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
    """The expected usage record of a request."""

    outcome: str
    input_tokens: int
    output_tokens: int
    cached: bool = False

    @property
    def neurons(self) -> Decimal:
        """Return the price."""
        return Decimal(0) if self.cached else NEURON_COST * (self.input_tokens + self.output_tokens)


@dataclass
class SimpleModel:
    """The service without concurrency, sockets and stores: its cached replies and the expected usage records."""

    reply_tokens: int
    cached: dict[tuple[str, int], Expected] = field(default_factory=dict)
    records: list[Expected] = field(default_factory=list)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    cache_hits: int = 0
    cache_misses: int = 0

    def count_cache_read(self, *, hit: bool) -> None:
        """Count a request that reads the response cache."""
        self.cache_hits += hit
        self.cache_misses += not hit

    def complete(self, prompt: str, input_tokens: int, max_tokens: int, *, no_cache: bool) -> Expected:
        """Return the expected record of a request that completes or is a cache hit."""
        key = (prompt, max_tokens)
        self.calls[GENERATE, "OK"] += 1
        if not no_cache:
            self.count_cache_read(hit=key in self.cached)
        if not no_cache and key in self.cached:
            hit = self.cached[key]
            expected = Expected(hit.outcome, hit.input_tokens, hit.output_tokens, cached=True)
        else:
            ends = self.reply_tokens <= max_tokens
            outcome = "END_OF_SEQUENCE" if ends else "MAX_TOKENS"
            expected = Expected(outcome, input_tokens, min(self.reply_tokens, max_tokens))
            if not no_cache:
                self.cached[key] = expected
        self.records.append(expected)
        return expected

    def end_early(self, method: str, code: str, input_tokens: int, output_tokens: int) -> None:
        """Record a new request, which is a cache miss, and which does not complete."""
        self.calls[method, code] += 1
        self.count_cache_read(hit=False)
        self.records.append(Expected(code, input_tokens, output_tokens))

    def metrics(self) -> dict[str, float]:
        """Return the expected metrics."""
        computed = [record for record in self.records if not record.cached]
        return {
            'tokens_total{type="input"}': sum(record.input_tokens for record in computed),
            'tokens_total{type="output"}': sum(record.output_tokens for record in computed),
            "neurons_total": float(sum((record.neurons for record in self.records), Decimal(0))),
            "response_cache_hits_total": self.cache_hits,
            "response_cache_misses_total": self.cache_misses,
            "queue_time_seconds_count": len(computed),
            "time_to_first_token_seconds_count": sum(record.output_tokens > 0 for record in computed),
            "time_per_output_token_seconds_count": sum(record.output_tokens > 1 for record in computed),
            **{f'requests_total{{code="{code}",method="{method}"}}': n for (method, code), n in self.calls.items()},
        }


class History:
    """A client that makes one request after another, and applies each to the simple model."""

    def __init__(self, service: Service, deadlines: CallDeadlines, draw: random.Random) -> None:
        self.service = service
        self.deadlines = deadlines
        self.draw = draw
        self.model = SimpleModel(len(service.model.reply_ids))
        self.new_prompts = 0
        self.expected_by_id: dict[str, Expected] = {}

    async def step(self) -> None:
        """Make a random request."""
        kinds = [self.complete, self.complete, self.complete, self.cancel, self.expire, self.fail, self.reject]
        await self.draw.choice(kinds)()

    async def complete(self, prompt: str | None = None) -> None:
        """Make a request that completes; some prompts are repeated."""
        prompt, max_tokens = prompt or f"prompt {self.draw.randrange(8)}", self.draw.choice([1, 3, 200])
        no_cache = self.draw.random() < 0.2
        request = pb.GenerateRequest(prompt=prompt, max_tokens=max_tokens, no_cache=no_cache)
        expected = self.model.complete(prompt, await self.tokens(prompt), max_tokens, no_cache=no_cache)
        reply = await self.service.text.Generate(request)
        usage = reply.completion.usage
        assert (usage.input_tokens, usage.output_tokens) == (expected.input_tokens, expected.output_tokens)
        assert (Decimal(usage.neurons), reply.completion.cached) == (expected.neurons, expected.cached)
        self.expected_by_id[reply.completion.request_id] = expected

    async def cancel(self) -> None:
        """Cancel a request after some tokens; the step in progress still completes, and its token counts."""
        prompt, read = self.new_prompt(), self.draw.randrange(1, 5)
        self.service.model.gate()
        self.service.model.allow(read)
        call = self.service.text.GenerateStream(pb.GenerateRequest(prompt=prompt))
        await call.read()
        await self.service.model.wait_until_blocked(read)
        call.cancel()
        await self.settle(STREAM, "CANCELLED")
        self.model.end_early(STREAM, "CANCELLED", await self.tokens(prompt), read + 1)

    async def expire(self) -> None:
        """Let the deadline of a request pass while the model is in a step."""
        prompt = self.new_prompt()
        self.service.model.gate()
        call = self.service.text.Generate(pb.GenerateRequest(prompt=prompt), metadata=server_deadline())
        await self.service.wait_until_in_step()
        self.deadlines.expire()
        with pytest.raises(grpc.aio.AioRpcError) as expired:
            await call
        assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await self.settle(GENERATE, "DEADLINE_EXCEEDED")
        self.model.end_early(GENERATE, "DEADLINE_EXCEEDED", await self.tokens(prompt), 1)

    async def fail(self) -> None:
        """Make a request that fails in the engine before any token is computed."""
        self.service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await self.service.text.Generate(pb.GenerateRequest(prompt=self.new_prompt()))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        self.service.model.failure = None
        self.model.end_early(GENERATE, "INTERNAL", 0, 0)

    async def reject(self) -> None:
        """Make an invalid request, which leaves no record."""
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await self.service.text.Generate(pb.GenerateRequest(prompt="x", top_p=2))
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        self.model.calls[GENERATE, "INVALID_ARGUMENT"] += 1

    async def settle(self, method: str, code: str) -> None:
        """Wait until the server has counted the call, then let the step in progress end."""
        labels = {"method": method, "code": code}
        finished = self.model.calls[method, code] + 1
        registry = self.service.metrics.registry
        await until(lambda: registry.get_sample_value("llama2_requests_total", labels) == finished)
        self.service.model.open_gate()
        await self.complete(self.new_prompt())  # waits until the slot is free

    async def tokens(self, prompt: str) -> int:
        """Return the number of input tokens of a prompt."""
        count = await self.service.text.CountTokens(pb.CountTokensRequest(prompt=prompt))
        return count.input_tokens

    def new_prompt(self) -> str:
        """Return a prompt that no other request has."""
        self.new_prompts += 1
        return f"new {self.new_prompts}"


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_history_is_accounted_exactly(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, deadlines: CallDeadlines, seed: int
) -> None:
    """After 200 random requests, the ledger, the usage in the replies, the metrics and the simple model are equal."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))
    metrics = Metrics(CollectorRegistry())
    async with serve_scripted(REPLY, card=card, telemetry=Telemetry(metrics)) as service:
        history = History(service, deadlines, random.Random(seed))
        for _ in range(200):
            await history.step()
    records = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
    found = Counter((record.outcome, record.input_tokens, record.output_tokens, record.cached) for record in records)
    expected = history.model.records
    assert found == Counter(
        (record.outcome, record.input_tokens, record.output_tokens, record.cached) for record in expected
    )
    assert sum((record.neurons for record in records), Decimal(0)) == sum(record.neurons for record in expected)
    by_id = {record.request_id: record for record in records}
    for request_id, record in history.expected_by_id.items():
        assert (by_id[request_id].neurons, by_id[request_id].outcome) == (record.neurons, record.outcome)
    assert metric_values(metrics, *history.model.metrics()) == history.model.metrics()


def metric_values(metrics: Metrics, *series: str) -> dict[str, float]:
    """Return the values of series, whose names are as in the text format without the prefix `llama2_`."""
    lines = (line.rpartition(" ") for line in generate_latest(metrics.registry).decode().splitlines())
    values = {name.removeprefix("llama2_"): float(value) for name, _, value in lines if not name.startswith("#")}
    return {name: values[name] for name in series}
