"""A small simulation with the server's real threads, sockets and clock, checked against the same model."""

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.reliability.simulation.history import Event, History
from tests.reliability.simulation.model import calls, queue
from tests.reliability.simulation.model.facts import MET, Facts
from tests.reliability.simulation.observer import HistoryTelemetry, observe
from tests.reliability.simulation.run import add_database, counters
from tests.support.accounts import AccountByHeader
from tests.support.service import Service, ServiceMaker, until, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

REPLY = "Once upon a time, a fox lived by the sea."
CLIENTS = 12
CALLS = 20
ACCOUNTS = 3
# The other rules need virtual time: on a busy machine, a free slot can wait for its thread.
RULES = (
    calls.every_call_ends,
    calls.statuses_are_true,
    calls.replies_are_exact,
    calls.one_record_per_request,
    calls.records_are_exact,
    calls.totals_are_exact,
    queue.slots_are_limited_and_free_again,
    queue.quota_is_never_exceeded,
)


class Clients:
    """Clients that complete, cancel, read slowly, share replies, and send invalid requests, all at the same time."""

    def __init__(self, service: Service, history: History, draw: random.Random) -> None:
        self.service, self.history, self.draw = service, history, draw
        self.calls = 0

    async def run(self) -> None:
        """Run all clients to their end."""
        await asyncio.gather(*(self.client(index) for index in range(CLIENTS)))

    async def client(self, index: int) -> None:
        """Make one call after another."""
        for _ in range(CALLS):
            await self.call(f"a{index % ACCOUNTS}", self.draw.choice(["read", "read", "cancel", "slow", "invalid"]))

    async def call(self, account: str, kind: str) -> None:
        """Make a call, and add it and its end to the history."""
        self.calls += 1
        number, max_tokens = self.calls, self.draw.choice([1, 3, 200])
        repeated = self.draw.random() < 0.4
        request = pb.GenerateRequest(prompt=f"{self.draw.randrange(4) if repeated else number}", raw=True)
        request.max_tokens = 10**6 if kind == "invalid" else max_tokens
        count = await self.service.text.CountTokens(pb.CountTokensRequest(prompt=request.prompt, raw=True))
        expected = [count.input_tokens, min(len(self.service.model.reply_ids), max_tokens)]
        self.history.add("call", call=number, account=account, kind=kind, process="", expected=expected)
        metadata = (("account", account), ("call", str(number)))
        call: Any = self.service.text.GenerateStream(request, metadata=metadata)
        end: Event = {}
        turns = self.draw.randrange(60)
        try:
            while isinstance(message := await call.read(), pb.GenerateStreamResponse):
                end |= completed(message)
                for _ in range(turns if kind in ("slow", "cancel") else 0):
                    await asyncio.sleep(0)
                if kind == "cancel":
                    call.cancel()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass  # the status follows
        self.history.add("end", call=number, code=(await call.code()).name, **end)


def completed(message: pb.GenerateStreamResponse) -> Event:
    """Return what the last message of a reply states."""
    if not message.HasField("completion"):
        return {}
    completion = message.completion
    reason = pb.FinishReason.Name(completion.finish_reason).removeprefix("FINISH_REASON_")
    usage = [completion.usage.input_tokens, completion.usage.output_tokens]
    cached, neurons = completion.cached, completion.usage.neurons
    return {"id": completion.request_id, "usage": usage, "neurons": neurons, "cached": cached, "finish_reason": reason}


@pytest.mark.parametrize("seed", [1, 2])
async def test_threads(
    serve_scripted: ServiceMaker, demo_card: ModelCard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    """240 calls of 12 clients: statuses, replies, records, slots, totals and counters agree with the model."""
    history = History()
    observe(monkeypatch, history)
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))
    limits = {f"a{index}": 10**6 for index in range(ACCOUNTS)}
    costs = {name: str(cost) for name, cost in card.neuron_costs.items()}
    history.add("shape", seed=seed, slots=1, queue=64, limits=limits, costs=costs, shared={})
    telemetry = HistoryTelemetry(history, "")
    async with serve_scripted(REPLY, card=card, accounts=AccountByHeader(), telemetry=telemetry) as service:
        clients = Clients(service, history, random.Random(seed))
        await clients.run()
        gauge: Callable[[str], Any] = service.metrics.registry.get_sample_value
        await until(lambda: gauge("llama2_requests_running") == gauge("llama2_requests_queued") == 0)
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as connection:
        add_database(history, "local", connection)
    facts = Facts(history)
    assert [line for rule in RULES for line in rule(facts) if line is not MET] == []
    assert len(facts.ends) == CLIENTS * CALLS
    computed = [records[0] for records in facts.records.values() if not records[0]["cached"]]
    counted = counters(telemetry.metrics.registry)
    assert counted["input"] == sum(record["usage"][0] for record in computed)
    assert counted["output"] == sum(record["usage"][1] for record in computed)
    # CountTokens was called once per call.
    assert counted["llama2_requests_total"] == 2 * len(facts.ends)
