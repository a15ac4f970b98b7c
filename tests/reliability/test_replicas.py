"""Exact quotas and usage under load: two servers with Redis and PostgreSQL, and one server with the embedded stores."""

import asyncio
import csv
import random
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import grpc
import grpc.aio
import pytest
from tests.integration.usage.conftest import stored
from tests.support.processes import card_file, command, server
from tests.support.repository import ROOT
from tests.support.servers.postgres_server import PostgresCluster
from tests.support.servers.redis_server import running_redis

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.keys.keys_file import new_key

ACCOUNTS = ("alpha", "beta", "gamma", "delta", "32118455")
QUOTA = 20  # less than the clients request
CLIENTS = 50
CALLS_PER_CLIENT = 4
PATIENT_SERVER = "tests.support.programs.patient_process"


@dataclass
class Results:
    """The results of all clients."""

    completions: list[pb.Completion] = field(default_factory=list)
    rejected: int = 0
    cancelled: int = 0


@asynccontextmanager
async def servers(folder: Path, keys: dict[str, str], count: int, *flags: str) -> AsyncIterator[list[str]]:
    """Run servers that accept the keys, and yield their addresses; drain them at the end."""
    (folder / "keys.yaml").write_text("keys:\n" + "".join(f"  {line}\n" for line in keys.values()))
    demo = ROOT / "server/llama2_server/demo"
    card = card_file(folder, max_requests_per_min={"default": QUOTA, "accounts": {32118455: QUOTA}})
    flags = ("--card", str(card), "--weights", str(demo), "--api-keys-file", str(folder / "keys.yaml"), *flags)
    async with AsyncExitStack() as stack:
        processes, addresses = [], []
        for index in range(count):
            data = folder / f"server{index}"
            data.mkdir()
            process, address = stack.enter_context(
                server(data, "--max-queue-size", "300", *flags, module=PATIENT_SERVER)
            )
            processes.append(process)
            addresses.append(address)
        yield addresses
        for process in processes:
            process.terminate()
        for process in processes:
            assert await asyncio.to_thread(process.wait, 60) == 0


async def client(address: str, key: str, results: Results, draw: random.Random) -> None:
    """Make calls one after another; cancel one in ten after its first delta."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        for _ in range(CALLS_PER_CLIENT):
            cancels = draw.random() < 0.1
            request = pb.GenerateRequest(prompt=draw.choice(["hi", "hello"]), seed=draw.randrange(9), max_tokens=8)
            call = stub.GenerateStream(request, metadata=(("authorization", f"Bearer {key}"),))
            try:
                while isinstance(message := await call.read(), pb.GenerateStreamResponse):
                    if cancels:
                        call.cancel()
                        results.cancelled += 1
                        break
                    if message.HasField("completion"):
                        results.completions.append(message.completion)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                results.rejected += 1


async def run_clients(addresses: list[str], keys: dict[str, str]) -> Results:
    """Run all clients, and check that exactly the quota is allowed."""
    draw, results = random.Random(3), Results()
    accounts = list(keys)
    clients = [
        client(
            addresses[index % len(addresses)], accounts[index % len(accounts)], results, random.Random(draw.random())
        )
        for index in range(CLIENTS)
    ]
    await asyncio.gather(*clients)
    assert results.rejected == CLIENTS * CALLS_PER_CLIENT - QUOTA * len(ACCOUNTS)
    return results


async def check_ledger(url: str, results: Results) -> None:
    """Check that each account used exactly its quota, each request has one record, and the neurons are exact."""
    records = {record.request_id: record for record in await stored(url)}
    assert Counter(record.account_id for record in records.values()) == dict.fromkeys(ACCOUNTS, QUOTA)
    assert len(records) == len(results.completions) + results.cancelled
    for completion in results.completions:
        record = records[completion.request_id]
        usage = completion.usage
        assert (record.input_tokens, record.output_tokens) == (usage.input_tokens, usage.output_tokens)
        assert (record.neurons, record.cached) == (Decimal(usage.neurons), completion.cached)
    total = sum((record.neurons for record in records.values() if not record.cached), Decimal(0))
    tokens = sum(record.input_tokens + record.output_tokens for record in records.values() if not record.cached)
    assert total == tokens * Decimal("0.3672")


@pytest.mark.timeout(300)
async def test_two_servers_share_quota_and_ledger(tmp_path: Path, postgres: PostgresCluster) -> None:
    """50 clients of 5 accounts call two servers and cancel one call in ten: quotas and records are exact."""
    keys = dict(new_key(account) for account in ACCOUNTS)
    usage_url = postgres.new_database()
    with running_redis(tmp_path) as redis:
        flags = ["--redis-url", redis.url, "--usage-url", usage_url]
        async with servers(tmp_path, keys, 2, *flags) as addresses:
            results = await run_clients(addresses, keys)
    await check_ledger(usage_url, results)


@pytest.mark.timeout(300)
async def test_one_server_with_embedded_stores_is_exact(tmp_path: Path) -> None:
    """The same load on one server with only its data directory."""
    keys = dict(new_key(account) for account in ACCOUNTS)
    async with servers(tmp_path, keys, 1) as addresses:
        results = await run_clients(addresses, keys)
    await check_ledger(f"sqlite:///{tmp_path / 'server0' / 'usage.db'}", results)
    data = ["--data-directory", str(tmp_path / "server0")]
    report = command("usage", *data, "--account", "alpha", "--format", "csv")
    printed = subprocess.run(report, capture_output=True, text=True, check=True)
    header, values = csv.reader(printed.stdout.splitlines())
    assert dict(zip(header, values, strict=True))["requests"] == str(QUOTA)
