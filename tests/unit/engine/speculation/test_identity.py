"""Prompt lookup changes the speed and never the tokens: the same build with and without it, on seeded cases.

`python -m tests.reliability.speculation` runs more of them.
"""

from typing import Any

import pytest
import torch
from tests.reliability.speculation.cases import CONTEXT, CYCLE, VOCAB, Case, Pair, families, some_cases
from tests.support.checkpoints import MakeCheckpoint
from tests.unit.engine.native.models import library

from llama2_server.engine.model.cpu_kernels import CpuKernels
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason
from llama2_server.engine.speculation.row_costs import RowCosts

CASES = 250


@pytest.fixture(autouse=True)
def _native_with_fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured costs decide how long drafts are, so without them each run has the same drafts."""
    library()
    monkeypatch.setattr(RowCosts, "observe", lambda *_: None)


def cyclic(checkpoint: MakeCheckpoint, **shape: Any) -> Any:
    return checkpoint(dtype=torch.float16, vocab=VOCAB, context=CONTEXT, **{"cycle": CYCLE} | shape)


@pytest.mark.parametrize("kernels", ["portable", "amx"])
@pytest.mark.parametrize("cycle", [CYCLE, 0], ids=["a model that copies", "random weights"])
def test_replies_are_equal(checkpoint: MakeCheckpoint, cycle: int, kernels: CpuKernels) -> None:
    """Tokens, end and counts, and of single requests the reused tokens, do not depend on prompt lookup.

    The cases are greedy and sampled, with penalties, end tokens and stop sequences, up to eight at once.
    """
    if kernels not in families():
        pytest.skip("NOT TESTED: this processor does not support AMX")
    pair = Pair(cyclic(checkpoint, cycle=cycle), cpu_kernels=kernels)
    differences = pair.differences(some_cases(1, CASES))
    pair.close()
    assert differences == []
    assert pair.plain_counts.proposed == 0
    assert pair.counts.accepted > (200 if cycle else 20)
    assert pair.counts.accepted < pair.counts.proposed
    assert pair.counts.steps < pair.plain_counts.steps


def passage(length: int) -> list[int]:
    return [CYCLE + index % CYCLE for index in range(length)]


@pytest.mark.parametrize("max_tokens", [1, 2, 16, 17, 40])
def test_max_tokens_inside_a_draft(checkpoint: MakeCheckpoint, max_tokens: int) -> None:
    """A draft never passes the last allowed token."""
    pair = Pair(cyclic(checkpoint), frozenset())
    case = Case(passage(60), GenerationParams(max_tokens, temperature=0), None, "a")
    assert pair.differences([case]) == []
    pair.close()
    assert pair.plain_counts.steps == 2 + max_tokens - 1
    assert max_tokens < 3 or pair.counts.steps < pair.plain_counts.steps


def test_a_stop_inside_a_draft_leaves_nothing_to_reuse(checkpoint: MakeCheckpoint) -> None:
    """Right guesses after a stop sequence are neither counted nor a prefix for the next turn."""
    pair = Pair(cyclic(checkpoint), frozenset())
    stop = (CYCLE + 4, CYCLE + 5)
    first = Case(passage(60), GenerationParams(60, temperature=0), stop, "a")
    assert pair.differences([first]) == []
    expected = passage(100)[60:]
    reply = expected[: expected.index(stop[1]) + 1]
    second = Case([*first.prompt_ids, *expected, 5], GenerationParams(5, temperature=0), None, "a")
    replies = [pair.run(index, [second])[0].observed(with_reuse=True) for index in range(2)]
    pair.close()
    assert replies[0] == replies[1]
    assert replies[0][1].reused_input_tokens == 60 + len(reply) - 1


def test_an_end_token_inside_a_draft_ends_the_reply(checkpoint: MakeCheckpoint) -> None:
    """The end-of-sequence token is counted, and nothing after it."""
    end = CYCLE + 7
    pair = Pair(cyclic(checkpoint), frozenset({end}))
    case = Case(passage(20 + CYCLE), GenerationParams(60, temperature=0), None, None)
    assert pair.differences([case]) == []
    _, result = pair.run(0, [case])[0].observed(with_reuse=True)
    pair.close()
    assert result.reason is FinishReason.END_OF_SEQUENCE
    assert result.output_tokens == 12


def test_a_cancellation_ends_within_a_step(checkpoint: MakeCheckpoint) -> None:
    """Of a step with right guesses, the tokens after a cancellation are not passed on, and only the others count."""
    pair = Pair(cyclic(checkpoint), frozenset())
    reply = pair.run_and_cancel(0, Case(passage(100), GenerationParams(300, temperature=0), None, None), after=25)
    tokens, result = reply.observed(with_reuse=True)
    pair.close()
    assert result.reason is FinishReason.CANCELLED
    assert len(tokens) == result.output_tokens == 25
    assert pair.counts.accepted > 5
