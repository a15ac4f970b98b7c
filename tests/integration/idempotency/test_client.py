"""The Python clients continue streams that break off, with a real server that restarts."""

import asyncio
from pathlib import Path

import pytest
from tests.integration.idempotency.conftest import REPLY
from tests.integration.service.conftest import limited, records
from tests.support.processes import free_port
from tests.support.service import ServiceMaker

from llama2_client import Client, ReplyStream
from llama2_server.card import ModelCard


@pytest.mark.parametrize("characters", [1, 12, 22])
async def test_stream_survives_a_restart(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, characters: int
) -> None:
    """The joined text is the reply, and no character is shown twice; there is one record and one quota unit."""
    listen, text = f"127.0.0.1:{free_port()}", ""
    settings: dict[str, object] = {"card": limited(demo_card, 1), "listen": listen, "shutdown_grace_seconds": 0}
    async with Client(listen, resume=True, timeout=60) as client:
        async with serve_scripted(REPLY, **settings) as service:
            service.model.gate()
            stream = client.stream("a story")
            while len(text) < characters:
                service.model.allow(1)
                text += await anext(stream)
            await service.wait_until_in_step()
        rest = asyncio.ensure_future(_read(stream))
        async with serve_scripted(REPLY, **settings):
            text += await rest
    assert text == REPLY
    (record,) = records(tmp_path)
    assert record["request_id"] == stream.reply.request_id
    assert record["neurons"] == stream.reply.neurons


async def _read(stream: ReplyStream) -> str:
    return "".join([delta async for delta in stream])
