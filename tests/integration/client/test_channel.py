"""The client's connections: targets, load balancing, API keys and TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from tests.integration.client.samples import REPLY
from tests.support.certificates import Authority
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, Unavailable


async def test_calls_are_distributed_over_all_addresses(server: ScriptedServer) -> None:
    """With two addresses, each server gets every other call."""
    async with (
        ScriptedServer.running() as other,
        Client(f"ipv4:{server.address},{other.address}", timeout=10) as client,
    ):
        async with asyncio.timeout(10):
            while not (server.requests and other.requests):  # until both connections are established
                await client.generate("Hi")
        before = len(server.requests), len(other.requests)
        for _ in range(6):
            await client.generate("Hi")
        assert (len(server.requests) - before[0], len(other.requests) - before[1]) == (3, 3)


async def test_the_key_is_sent_as_a_bearer_token(server: ScriptedServer) -> None:
    """Every call sends the API key in the authorization header."""
    async with Client(server.address, api_key="s3cret") as client:
        await client.generate("Hi")
        await client.model_card()
        async for _ in client.stream("Hi"):
            pass
    assert [metadata.get("authorization") for metadata in server.metadata] == ["Bearer s3cret"] * 3


async def test_without_a_key_no_header_is_sent(client: Client, server: ScriptedServer) -> None:
    """Without a key, a call has no authorization header."""
    await client.generate("Hi")
    assert "authorization" not in server.metadata[0]


def test_the_key_is_never_shown() -> None:
    """Neither the client's repr nor the error for an invalid key contains the key."""
    assert "s3cret" not in repr(Client(api_key="s3cret"))
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Client(api_key="s3cret\n")
    assert "s3cret" not in str(caught.value)


async def test_a_closed_client_can_be_used_again(client: Client) -> None:
    """A closed client opens new connections at the next call."""
    await client.generate("Hi")
    await client.aclose()
    assert await client.generate("Hi") == REPLY


@pytest.mark.parametrize(
    ("target", "resolved"),
    [
        ("localhost:50051", "dns:///localhost:50051"),
        ("llama2.default.svc", "dns:///llama2.default.svc:50051"),
        ("127.0.0.1", "dns:///127.0.0.1:50051"),
        ("::1", "dns:///[::1]:50051"),
        ("[::1]:80", "dns:///[::1]:80"),
        ("[::1]", "dns:///[::1]:50051"),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("unix:/run/llama2.sock", "unix:/run/llama2.sock"),
        ("dns://8.8.8.8/llama2:1", "dns://8.8.8.8/llama2:1"),
    ],
)
def test_plain_addresses_are_resolved_by_dns(target: str, resolved: str) -> None:
    """DNS resolves a host and port; targets with a gRPC scheme stay unchanged."""
    assert Client(target).target == resolved


async def test_tls_trusts_the_given_root(tmp_path: Path) -> None:
    """A call succeeds if the client trusts the server's root certificate and fails with the public roots."""
    authority = Authority(tmp_path)
    certificate, key = authority.pair()
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    async with ScriptedServer.running(credentials=credentials) as server:
        async with Client(server.address, tls=authority.root, timeout=10) as client:
            assert await client.generate("Hi") == REPLY
        async with Client(server.address, tls=True, timeout=10) as client:
            with pytest.raises(Unavailable):
                await client.generate("Hi")


async def test_tls_accepts_channel_credentials() -> None:
    """`tls` accepts any gRPC channel credentials."""
    async with (
        ScriptedServer.running(credentials=grpc.local_server_credentials()) as server,
        Client(server.address, tls=grpc.local_channel_credentials(), timeout=10) as client,
    ):
        assert await client.generate("Hi") == REPLY
