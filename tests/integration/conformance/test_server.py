"""The conformance kit against this repository's server."""

from collections import Counter
from typing import Any

import pytest
from conformance.server_runner.call import make_call
from conformance.server_runner.outcome import Outcome
from conformance.server_runner.run import run_case, run_cases
from conformance.server_runner.suite import PROFILES, load_cases
from conformance.server_runner.target import Target

pytestmark = pytest.mark.asyncio(loop_scope="session")

NUMBERS = (
    "text 14, stream 12, schema 34, limits 10, sampling 12, stop 8, seeds 4, errors 14, auth 8, quota 8, queue 9,"
    " cancel 8, cache 10, counting 11, card 4, usage 5, health 6, reflection 4, wire 9, json 18, free_calls 3,"
    " budget 10, idempotency 16, fingerprint 5, receipt 7"
)


@pytest.mark.timeout(300)  # 20 seconds on two idle cores
async def test_this_server_conforms(target: Target) -> None:
    """Every case of every profile passes."""
    cases = load_cases()
    results = await run_cases(target, cases, claimed=PROFILES, known_failures={})
    failed = {result.case.name: result.differences for result in results if result.outcome != "passed"}
    assert not failed
    assert len(results) == len(cases) >= 200


async def test_number_of_cases() -> None:
    """Each folder of the contract has its cases."""
    numbers = Counter(case.name.partition("/")[0] for case in load_cases())
    assert numbers == {name: int(number) for name, number in (entry.split() for entry in NUMBERS.split(", "))}


async def test_unclaimed_profiles_and_known_failures(target: Target) -> None:
    """An unclaimed profile is not claimed, never passed; an unexpected pass of a known failure fails."""
    cases = [case for case in load_cases() if case.name in {"text/chat-prompt", "health/server", "text/empty-reply"}]
    results = await run_cases(target, cases, claimed={"core"}, known_failures={"text/chat-prompt": "a reason"})
    outcomes = {result.case.name: (result.outcome, result.ok) for result in results}
    assert outcomes == {
        "health/server": ("not claimed", True),
        "text/chat-prompt": ("unexpected pass", False),
        "text/empty-reply": ("passed", True),
    }


async def test_a_case_needs_its_other_profiles(target: Target) -> None:
    """A case of two profiles is claimed only with both."""
    cases = [case for case in load_cases() if case.name == "fingerprint/of-a-cached-reply"]
    for claimed, outcome in (({"fingerprint"}, "not claimed"), ({"fingerprint", "cache"}, "passed")):
        (result,) = await run_cases(target, cases, claimed=claimed, known_failures={})
        assert result.outcome == outcome


async def test_a_difference_fails(target: Target) -> None:
    """A case with another text fails with both texts, and is a known failure if it is listed."""
    (case,) = [case for case in load_cases() if case.name == "text/raw-continues"]
    case.document["steps"][0]["expect"]["text"] = "other"
    for known, outcome in (({}, "failed"), ({case.name: "a reason"}, "known failure")):
        (result,) = await run_cases(target, [case], claimed=PROFILES, known_failures=known)
        assert result.outcome == outcome
        assert result.differences == ("step 1: text: want 'other', got ' one two three seven hundred twice'",)


async def test_a_cancelled_call_ends_no_repetition(target: Target) -> None:
    """A step that cancels its calls makes all of them."""
    (case,) = [case for case in load_cases() if case.name == "cancel/many"]
    calls = 0

    async def count(*arguments: Any) -> Outcome:
        nonlocal calls
        calls += 1
        return await make_call(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conformance.server_runner.run.make_call", count)
        assert await run_case(target, case) == []
    assert calls >= sum(step.repeat or 1 for step in case.expand().steps) > len(case.document["steps"])
