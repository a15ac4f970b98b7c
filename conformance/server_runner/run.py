"""Run cases against a server."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from conformance.server_runner.call import make_call
from conformance.server_runner.check import check
from conformance.server_runner.outcome import Outcome
from conformance.server_runner.suite import StoredCase, SuiteError
from conformance.server_runner.target import Target
from conformance.v1 import conformance_pb2 as pb
from llama2.v1 import text_generation_pb2

CASE_TIMEOUT_SECONDS = 60
CALLS_AT_ONCE = 16
NEXT_REQUEST = text_generation_pb2.GenerateRequest(prompt="hello", raw=True, max_tokens=1, no_cache=True)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The result of one case; `outcome` is passed, failed, known failure, unexpected pass or not claimed."""

    case: StoredCase
    outcome: str
    differences: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the run may succeed with this result."""
        return self.outcome not in {"failed", "unexpected pass"}


async def run_cases(
    target: Target,
    cases: Sequence[StoredCase],
    *,
    claimed: Collection[str],
    known_failures: Mapping[str, str],
    on_result: Callable[[CaseResult], None] = lambda _: None,
) -> list[CaseResult]:
    """Run the cases of the claimed profiles one after the other.

    Args:
        target: the server under test.
        cases: the cases.
        claimed: the profiles that the server claims.
        known_failures: a reason for each case that is known to fail.
        on_result: is called with each result.
    """
    results = []
    for case in cases:
        result = CaseResult(case, "not claimed")
        if {case.profile, *case.needs} <= set(claimed):
            started = time.monotonic()
            differences = await run_case(target, case)
            outcome = outcome_of(bool(differences), case.name in known_failures)
            result = CaseResult(case, outcome, tuple(differences), time.monotonic() - started)
        results.append(result)
        on_result(result)
    return results


def outcome_of(failed: bool, known: bool) -> str:
    """Return the outcome of a case."""
    if failed:
        return "known failure" if known else "failed"
    return "unexpected pass" if known else "passed"


async def run_case(target: Target, stored: StoredCase) -> list[str]:
    """Run one case and return each difference in words.

    Raises:
        SuiteError: the kit has no key for a role.
    """
    try:
        async with asyncio.timeout(CASE_TIMEOUT_SECONDS):
            return await _CaseRun(target, stored.expand()).run()
    except SuiteError:
        raise
    except TimeoutError:
        return [f"not finished after {CASE_TIMEOUT_SECONDS} seconds"]
    except Exception as error:  # a server can return anything, and the other cases must run
        return [f"{type(error).__name__}: {error}"]


class _CaseRun:
    def __init__(self, target: Target, case: pb.Case) -> None:
        self._target = target
        self._case = case
        self._keys: dict[str, str | None] = {}
        self._outcomes: list[Outcome] = []
        self._background: list[tuple[int, asyncio.Task[list[Outcome]]]] = []

    async def run(self) -> list[str]:
        differences: list[str] = []
        try:
            for number, step in enumerate(self._case.steps, 1):
                differences += [f"step {number}: {text}" for text in await self._run_step(number, step)]
            for number, task in self._background:
                step = self._case.steps[number - 1]
                if step.codes or step.HasField("expect"):
                    differences += [f"step {number}: {text}" for text in self._check(step, await task)]
        finally:
            await self._end_background()
        return differences

    async def _end_background(self) -> None:
        """Cancel the calls in the background whose results no rule needs, and wait until their slot is free."""
        running = [task for _, task in self._background if not task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if running:
            await make_call(self._target, pb.Step(generate=NEXT_REQUEST), self._key("main"), lambda: None)

    async def _run_step(self, number: int, step: pb.Step) -> list[str]:
        key = self._key(step.key or "main")
        first = asyncio.Event()
        if step.background:
            self._background.append((number, asyncio.create_task(self._calls(step, key, first.set))))
            await first.wait()
            if step.together:
                # The answer shows that the server has read the requests before it, which wait in the queue.
                await make_call(self._target, pb.Step(get_model_card={}), key, lambda: None)
            self._outcomes.append(Outcome())
            return []
        outcomes = await self._calls(step, key, first.set)
        self._outcomes.append(outcomes[-1])
        found = self._check(step, outcomes)
        if step.expect.slot_free_within_ms:
            found += await self._check_slot(key, step.expect.slot_free_within_ms)
        return found

    async def _calls(self, step: pb.Step, key: str | None, on_first: Callable[[], None]) -> list[Outcome]:
        count = step.repeat or 1
        numbers, outcomes = iter(range(count)), list[Outcome]()

        async def work() -> None:
            for _ in numbers:
                outcomes.append(await make_call(self._target, step, key, on_first))
                if any(outcome.code == step.until for outcome in outcomes[-CALLS_AT_ONCE:]):
                    return

        await asyncio.gather(*(work() for _ in range(CALLS_AT_ONCE if step.together else 1)))
        return outcomes

    def _check(self, step: pb.Step, outcomes: list[Outcome]) -> list[str]:
        found = []
        if step.codes:
            found = _check_codes(step.codes, Counter(outcome.code for outcome in outcomes))
            outcomes = [one for one in outcomes if one.code == step.expect.code]
        found += [text for outcome in outcomes for text in check(step.expect, outcome, self._outcomes)]
        return list(dict.fromkeys(found))

    def _key(self, role: str) -> str | None:
        """Return the key of a role; one case uses one key of the roles `quota` and `budget`, `quota2` another one."""
        if role not in self._keys:
            self._keys[role] = self._target.keys.key(re.sub(r"\d+$", "", role))
        return self._keys[role]

    async def _check_slot(self, key: str | None, limit_ms: int) -> list[str]:
        started = time.monotonic()
        step = pb.Step(generate=NEXT_REQUEST)
        outcome = await make_call(self._target, step, key, lambda: None)
        milliseconds = (time.monotonic() - started) * 1000
        if outcome.code != "OK" or milliseconds > limit_ms:
            return [f"slot: the next call ended with {outcome.code} after {milliseconds:.0f} ms; want {limit_ms} ms"]
        return []


def _check_codes(wanted: Mapping[str, int], got: Counter[str]) -> list[str]:
    allowed = {code.removesuffix("+") for code in wanted}
    right = all(got[code[:-1]] >= count if code.endswith("+") else got[code] == count for code, count in wanted.items())
    return [] if right and set(got) <= allowed else [f"codes: want {dict(wanted)}, got {dict(got)}"]
