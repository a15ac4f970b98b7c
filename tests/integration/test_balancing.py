"""Several servers behind one name, like a headless Kubernetes service: how the Python client distributes its calls."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest
from tests.support.processes import server
from tests.support.servers.name_server import running_name_server
from tests.support.service import ONE_PORT_HOSTS, Service, ServiceMaker, needs_one_port_hosts, prefills, three_services

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_client import Client
from llama2_client.errors import Llama2Error

pytestmark = needs_one_port_hosts


async def call_all(call: Callable[[], Awaitable[object]], services: list[Service]) -> None:
    """Call until every server has a call, because the first connections get the first calls; then reset the counts."""
    async with asyncio.timeout(60):
        while not all(prefills(services)):
            await call()
    for service in services:
        service.model.prompts.clear()


async def test_calls_are_distributed_evenly(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """With one name and three addresses, calls of both RPCs go to each server in turn."""
    async with three_services(serve_scripted, tmp_path) as services:
        with running_name_server(*ONE_PORT_HOSTS) as names:
            async with Client(names.target(services[0].port)) as client:
                await call_all(lambda: client.generate("hi"), services)
                for _ in range(30):
                    await client.generate("hi")
                assert prefills(services) == [10, 10, 10]
                for _ in range(6):
                    async with client.stream("hi") as stream:
                        assert [delta async for delta in stream]
                assert prefills(services) == [12, 12, 12]


async def test_without_round_robin_one_server_gets_all_calls(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """With the default policy of gRPC, pick_first, two of the three servers receive no calls."""
    async with three_services(serve_scripted, tmp_path) as services:
        with running_name_server(*ONE_PORT_HOSTS) as names:
            async with grpc.aio.insecure_channel(names.target(services[0].port)) as channel:
                stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
                for _ in range(12):
                    await stub.Generate(pb.GenerateRequest(prompt="hi"))
        assert sorted(prefills(services)) == [0, 0, 12]


async def test_new_servers_are_found_when_a_connection_ends(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A server that is added to the name gets no calls until a connection ends; then the client resolves DNS again."""
    async with AsyncExitStack() as stack, AsyncExitStack() as old_stack:
        old = await old_stack.enter_async_context(
            serve_scripted(data_directory=tmp_path / "old", shutdown_grace_seconds=0)
        )
        port = old.port
        names = stack.enter_context(running_name_server("127.0.0.1"))
        client = await stack.enter_async_context(Client(names.target(port)))
        await client.generate("hi")
        started = serve_scripted(listen=f"127.0.0.2:{port}", data_directory=tmp_path / "new")
        new = await stack.enter_async_context(started)
        names.addresses = ["127.0.0.2"]
        await client.generate("hi")
        assert prefills([old, new]) == [2, 0]
        await old_stack.aclose()
        async with asyncio.timeout(60):
            while not new.model.prefills:
                with contextlib.suppress(Llama2Error):
                    await client.generate("hi")


@pytest.mark.timeout(300)
async def test_calls_of_a_killed_server_move_to_another(tmp_path: Path) -> None:
    """When one of three server processes is killed under load, every call succeeds, its own calls on another server."""
    async with AsyncExitStack() as stack:
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS))
        processes = []
        port = "0"
        for host in ONE_PORT_HOSTS:
            (tmp_path / host).mkdir()
            process, address = stack.enter_context(server(tmp_path / host, listen=f"{host}:{port}"))
            port = address.rpartition(":")[2]
            processes.append((process, await stack.enter_async_context(Client(address))))
        client = await stack.enter_async_context(Client(names.target(int(port))))

        async def generate() -> None:
            await client.generate("Tell me a story about a fox.", max_tokens=16, no_cache=True)

        async def count_requests(server_client: Client) -> int:
            quota = (await server_client.usage()).quota
            return quota.max_requests_per_min - quota.requests_left

        while not all([await count_requests(direct) for _, direct in processes]):
            await generate()
        calls = [asyncio.create_task(generate()) for _ in range(30)]
        await calls[0]
        victim, _ = processes[1]
        victim.kill()
        await asyncio.gather(*calls)
        for _ in range(6):
            await generate()
        assert victim.wait() != 0
