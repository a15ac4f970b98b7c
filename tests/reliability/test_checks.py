"""The checks of `make chaos` and `make soak` find planted faults."""

from dataclasses import replace
from decimal import Decimal

import pytest
from tests.reliability.chaos.history import History, Tokens
from tests.reliability.soak.samples import Sample, drifts, exceeded

TOLD = Tokens("MAX_TOKENS", 10, 20, Decimal("11.016"))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"a": replace(TOLD, output_tokens=19)},
        {"a": replace(TOLD, outcome="INTERRUPTED")},
        {"a": replace(TOLD, neurons=Decimal("11.0"))},
    ],
)
def test_records_that_differ_from_the_replies(wrong: dict[str, Tokens]) -> None:
    """A record that is missing or states something else than the client was told is a broken promise."""
    history = History(completed={"a": TOLD})
    assert list(history.broken_promises({"a": TOLD})) == []
    [promise] = history.broken_promises(wrong)
    assert promise.startswith("request a: the client was told")


def test_calls_without_a_record() -> None:
    """Each call that received text has a record, also if it did not end."""
    history = History(completed={"a": TOLD}, begun=2)
    interrupted = replace(TOLD, outcome="INTERRUPTED")
    assert list(history.broken_promises({"a": TOLD, "b": interrupted, "c": interrupted})) == []
    assert list(history.broken_promises({"a": TOLD, "b": interrupted})) == [
        "2 calls ended after their first text, but only 1 of them have a record"
    ]


@pytest.mark.parametrize(
    ("leak", "found"),
    [
        ({}, []),
        ({"memory_mb": 6.0}, ["memory (MB): +6.00 per 10,000 requests, the limit is 5"]),
        ({"files": 10}, ["file descriptors: +10.00 per 10,000 requests, the limit is 5"]),
        ({"threads": 7}, ["threads: +7.00 per 10,000 requests, the limit is 5"]),
    ],
)
def test_leaks_are_found(leak: dict[str, float], found: list[str]) -> None:
    """A growth with the requests is found after the warm-up, whose growth does not count."""
    samples = []
    for thousand in range(21):
        growth = {name: thousand / 10 * amount for name, amount in leak.items()}
        values = {"memory_mb": 500.0 + min(thousand, 5) * 20, "files": 25.0, "threads": 12.0}
        values |= {name: values[name] + grown for name, grown in growth.items()}
        samples.append(Sample(float(thousand), 1000 * thousand, **values))
    assert exceeded(drifts(samples)) == found
