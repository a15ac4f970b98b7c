"""A fixture that runs a test with both kinds of clients."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.integration.client.twins.twin import KINDS, Twin
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, SyncClient


@pytest.fixture(params=KINDS, ids=["async", "sync"])
def kind(request: pytest.FixtureRequest) -> type[Client] | type[SyncClient]:
    """Each kind of client in turn."""
    kind: type[Client] | type[SyncClient] = request.param
    return kind


@pytest.fixture
async def twin(kind: type[Client] | type[SyncClient], server: ScriptedServer) -> AsyncIterator[Twin]:
    """Connect a client of each kind, with a deadline of ten seconds per call, to the server."""
    async with Twin.connected(kind, server.address, timeout=10) as twin:
        yield twin
