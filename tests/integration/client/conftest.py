"""Fixtures for the client's tests: a scripted server on a real socket and a client connected to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    """Run a server that sends the replies the test scripts."""
    async with ScriptedServer.running() as server:
        yield server


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[Client]:
    """Connect a client with a deadline of ten seconds per call to the server."""
    async with Client(server.address, timeout=10) as client:
        yield client
