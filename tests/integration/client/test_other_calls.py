"""The other methods of `Client`: token counts, the model card, usage and health."""

from __future__ import annotations

from datetime import date

import pytest
from tests.integration.client.samples import TOKEN_COUNT
from tests.support.scripted_server import CARD, USAGE, ScriptedServer

from llama2.v1 import account_pb2, text_generation_pb2
from llama2_client import Client, HealthStatus, Message


async def test_count_tokens_returns_counts_and_forecast(client: Client, server: ScriptedServer) -> None:
    """The result has the counts, the price, the quota and the queue time; only given fields are sent."""
    assert await client.count_tokens("Hi", raw=True, max_tokens=256) == TOKEN_COUNT
    await client.count_tokens(messages=[Message("user", "Hi")])
    assert server.requests == [
        text_generation_pb2.CountTokensRequest(prompt="Hi", raw=True, max_tokens=256),
        text_generation_pb2.CountTokensRequest(messages=[text_generation_pb2.ChatMessage(role="user", content="Hi")]),
    ]


async def test_model_card_returns_the_card(client: Client) -> None:
    """The result is the server's card, unchanged."""
    assert await client.model_card() == CARD


async def test_usage_sends_the_given_days(client: Client, server: ScriptedServer) -> None:
    """The result is the server's usage, unchanged; days are sent as dates, and missing days stay unset."""
    assert await client.usage() == USAGE
    assert await client.usage(since=date(2026, 11, 2), until=date(2026, 11, 30)) == USAGE
    assert server.requests == [
        account_pb2.GetUsageRequest(),
        account_pb2.GetUsageRequest(since="2026-11-02", until="2026-11-30"),
    ]


@pytest.mark.parametrize(
    ("service", "status"),
    [
        ("", HealthStatus.SERVING),
        ("paused", HealthStatus.NOT_SERVING),
        ("missing", HealthStatus.SERVICE_UNKNOWN),
    ],
)
async def test_health_returns_the_status(client: Client, service: str, status: HealthStatus) -> None:
    """Each status of the health protocol has its own value, including an unknown service."""
    assert await client.health(service) is status
