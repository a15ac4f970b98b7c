"""Steps that compute a prompt and the tokens of other sequences together: equal tokens, and bounded waits."""

import threading
from collections.abc import Iterator

import pytest
import torch
from tests.reliability.speculation.cases import CONTEXT, CYCLE, VOCAB, Pair, some_cases
from tests.support.checkpoints import MakeCheckpoint
from tests.unit.engine.native.models import library, some_ids

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import Sequence, SequenceResult
from llama2_server.engine.speculation.row_costs import RowCosts
from llama2_server.engine.step_planner import MIN_PROMPT_ROWS, StepPlanner, StepPolicy
from llama2_server.engine.steps.report import StepPhase, StepReport

SECOND_PER_ROW = 0.01


class Listener:
    """Submits another sequence after its first token, from within the step loop."""

    def __init__(self, engine: Engine | None = None, prompt_ids: list[int] | None = None) -> None:
        self._engine, self._prompt_ids = engine, prompt_ids
        self.other: Listener | None = None
        self.token_ids: list[int] = []
        self.finished = threading.Event()

    def on_token(self, token_id: int) -> bool:
        self.token_ids.append(token_id)
        if self._engine is not None and self._prompt_ids is not None and self.other is None:
            self.other = Listener()
            self._engine.submit(self._prompt_ids, GenerationParams(3, temperature=0), self.other)
        return False

    def on_finish(self, result: SequenceResult) -> None:
        self.finished.set()


@pytest.fixture
def steps() -> list[StepReport]:
    return []


@pytest.fixture
def engine(checkpoint: MakeCheckpoint, steps: list[StepReport]) -> Iterator[Engine]:
    library()
    directory = checkpoint(dtype=torch.float16, vocab=VOCAB, context=CONTEXT)
    model = load_model(directory, device="cpu", dtype=torch.float16, context_length=CONTEXT, slots=4)
    engine = Engine(model, frozenset(), on_step=steps.append, step_policy=StepPolicy(prompt_lookup=False))
    yield engine
    assert engine.close(timeout_seconds=30)


def test_replies_among_others_equal_replies_alone(checkpoint: MakeCheckpoint) -> None:
    """Up to eight requests whose prompts and replies share steps get the tokens that each gets alone."""
    library()
    pair = Pair(checkpoint(dtype=torch.float16, vocab=VOCAB, context=CONTEXT, cycle=CYCLE))
    cases = some_cases(2, 120)
    together = [reply for start in range(0, len(cases), 8) for reply in pair.run(0, cases[start : start + 8])]
    observed = [reply.observed(with_reuse=False) for reply in together]
    assert observed == [reply.observed(with_reuse=False) for reply in pair.run_in_turn(0, cases)]
    pair.close()
    assert pair.counts.mixed > 20


def test_a_stream_gets_a_token_in_each_step_of_another_prompt(engine: Engine, steps: list[StepReport]) -> None:
    """While another prompt is read, each step also computes the next token of the stream."""
    stream = Listener(engine, some_ids(200))
    engine.submit(some_ids(5), GenerationParams(60, temperature=0), stream)
    assert stream.finished.wait(30)
    assert stream.other is not None
    assert stream.other.finished.wait(30)
    mixed = [step for step in steps if step.phase is StepPhase.MIXED]
    assert [step.phase for step in steps[: 1 + len(mixed)]] == [StepPhase.PREFILL, *[StepPhase.MIXED] * len(mixed)]
    assert sum(step.rows - 1 for step in mixed) == 200
    assert all(step.rows > MIN_PROMPT_ROWS for step in mixed[:-1])


def planner(seconds: float, max_rows: int = 64) -> StepPlanner:
    """Return a planner that has measured 10 ms for one row and 10 ms for each additional one."""
    planner = StepPlanner(
        StepPolicy(max_mixed_step_seconds=seconds), max_rows=max_rows, chunk_tokens=48, end_ids=frozenset()
    )
    for _ in range(200):
        for rows in (1, 20):
            planner._costs.observe(rows, rows * SECOND_PER_ROW)
    return planner


def sequence(prompt_tokens: int, output_tokens: int = 0) -> Sequence:
    found = Sequence([5] * prompt_tokens, GenerationParams(100), Listener())
    if output_tokens:
        found.position = prompt_tokens + output_tokens - 1
        found.output_ids = [6] * output_tokens
        found.requested = output_tokens
    return found


@pytest.mark.parametrize(
    ("seconds", "decoding", "expected"),
    [(0.1, 1, 16), (0.3, 1, 29), (0.3, 8, 22), (10.0, 1, 48), (10.0, 0, 48), (0.001, 0, 48), (10.0, 40, 24)],
)
def test_prompt_rows_fit_into_the_time_that_others_wait(seconds: float, decoding: int, expected: int) -> None:
    """At least 16 prompt rows, more as far as the expected time allows, and whole chunks if no sequence waits."""
    step = planner(seconds).plan(sequence(300), [sequence(10, 3) for _ in range(decoding)])
    assert step is not None
    assert len(step.chunk) == pytest.approx(expected, abs=1 if expected not in (16, 24, 48) else 0)
    assert len(step.decoding) == decoding


def test_a_prompt_needs_the_rows_more_than_guesses() -> None:
    """No guess is checked in a step that reads a prompt, and guesses return after it."""
    found, copying = planner(0.1), sequence(100, 3)
    copying.prompt_ids = list(range(3, 53)) * 2
    copying.output_ids = [3, 4, 5]
    for _ in range(2000):
        found._costs.observe(1, SECOND_PER_ROW)
    alone, mixed = found.plan(None, [copying]), found.plan(sequence(100), [copying])
    assert alone is not None
    assert mixed is not None
    assert alone.guesses > 3
    assert mixed.guesses == 0


def test_costs_are_measured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tells the planner the rows of each step."""
    observed: list[int] = []
    monkeypatch.setattr(RowCosts, "observe", lambda self, rows, seconds: observed.append(rows))
    listener = Listener()
    engine.submit(some_ids(50), GenerationParams(3, temperature=0), listener)
    assert listener.finished.wait(30)
    assert engine.close(30)
    assert observed == [48, 2, 1, 1]
