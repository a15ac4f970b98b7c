"""`llama2 usage`, `card`, `tokens` and `health`."""

from __future__ import annotations

import asyncio
import json

from google.protobuf.json_format import ParseDict
from tests.integration.client.cli.command import Result, run
from tests.support.scripted_server import USAGE, ScriptedServer

from llama2.v1 import account_pb2, text_generation_pb2


async def test_usage_is_a_table(server: ScriptedServer) -> None:
    """The table has one line per day and model, below the rest of the quota and the budget; --json has all fields.

    A day that is not a date is a usage error.
    """
    days = ("--since", "2026-11-02", "--until", "2026-11-30")
    table, whole, wrong = await asyncio.gather(
        run(server.address, "usage", *days),
        run(server.address, "usage", *days, "--json"),
        run(server.address, "usage", "--since", "yesterday"),
    )
    assert table.out.splitlines() == [
        "account 42: 3 of 5 requests per minute left; full again in 60 s",
        "budget: 12.1176 of 1000 neurons of this month spent, 93.3 reserved; the next month starts in 7 days",
        "date        model                          requests  input tokens  output tokens  cached tokens  neurons",
        "2026-11-22  @cf/meta/llama-2-7b-chat-fp16     1,234            20             13              0  12.1176",
        "2026-11-23  @cf/meta/llama-2-7b-chat-fp16         1             0              0             33        0",
    ]
    assert ParseDict(json.loads(whole.out), account_pb2.GetUsageResponse()) == USAGE
    assert server.requests == [account_pb2.GetUsageRequest(since="2026-11-02", until="2026-11-30")] * 2
    assert (table.code, whole.code, wrong.code) == (0, 0, 2)


async def test_card_is_readable(server: ScriptedServer) -> None:
    """The summary has the card's name, limits, quota and prices; --json has the whole card."""
    summary, whole = await asyncio.gather(run(server.address, "card"), run(server.address, "card", "--json"))
    for words in (
        "@cf/meta/llama-2-7b-chat-fp16",
        "3072 tokens",
        "60 requests per minute for this account, 5 ",
        "1000 neurons per month for this account",
        "0.3672 neurons",
    ):
        assert words in summary.out
    card = json.loads(whole.out)
    assert card["limits"]["context_length_limit"] == 3072
    assert card["generation_defaults"]["top_k"] == 0


async def test_tokens_prints_both_counts(server: ScriptedServer) -> None:
    """`tokens` prints the counts and the forecast of a call, as text or as JSON."""
    plain, as_json = await asyncio.gather(
        run(server.address, "tokens", "Hi"),
        run(server.address, "tokens", "-", "--raw", "--json", "--max-tokens", "9", stdin=b"Hi"),
    )
    assert plain.out == "20 input tokens; at most 2500 output tokens\n"
    assert "at most 101.3472 neurons · 3 requests left in this minute · queue about 4 s" in plain.err
    assert json.loads(as_json.out) == {
        "input_tokens": 20,
        "max_output_tokens": 2500,
        "max_neurons": "101.3472",
        "requests_left": 3,
        "estimated_queue_time": "4.500s",
    }
    assert text_generation_pb2.CountTokensRequest(prompt="Hi", raw=True, max_tokens=9) in server.requests


async def test_health_sets_the_exit_code(server: ScriptedServer) -> None:
    """`health` prints the status, and its exit code depends on the status."""
    serving, paused, missing = await asyncio.gather(
        run(server.address, "health"),
        run(server.address, "health", "paused"),
        run(server.address, "health", "missing", "--json"),
    )
    assert serving == Result(0, "SERVING\n", "")
    assert paused == Result(3, "NOT_SERVING\n", "")
    assert missing == Result(2, '{"status": "SERVICE_UNKNOWN"}\n', "")
