"""What the client's tests share: a scripted server on a real socket, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    """A running server that does what the test scripts."""
    async with ScriptedServer.running() as server:
        yield server


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[Client]:
    """A client of that server whose calls end within ten seconds."""
    async with Client(server.address, timeout=10) as client:
        yield client
