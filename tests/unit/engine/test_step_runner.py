"""Tests of the step runners on the host."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tests.support.checkpoints import MakeCheckpoint
from tests.support.sampling.token_reader import Reader
from tests.unit.engine.native.models import library, load, some_ids
from torch.utils._python_dispatch import TorchDispatchMode

from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult, TokenOrError
from llama2_server.engine.step_planner import DecodeRows, Step
from llama2_server.engine.step_runner import HostStepRunner, NativeStepRunner, host_step_runner

PARAMS = [
    GenerationParams(8),
    GenerationParams(8, 0.0),
    GenerationParams(8, 1.0, 0.95, 30, 1, 1.3, 0.5, 0.5),
    GenerationParams(8, 1.0, 1.0, seed=2),
]


class NoTorchOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fail on every torch operation of this thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"torch operation {func}")


def no_torch_operations() -> NoTorchOperations:
    return NoTorchOperations()  # type: ignore[no-untyped-call]


def only_tokens(found: Iterable[TokenOrError]) -> list[int]:
    return [token for token in found if isinstance(token, int)]


def test_a_native_step_uses_no_torch_operation(checkpoint: MakeCheckpoint) -> None:
    """Torch's own threads would spin on cores that others need. Prefill, decoding and sampling run in C++."""
    library()
    runner = host_step_runner(load(checkpoint(dtype=torch.float16), cpu_kernels="auto"))
    assert isinstance(runner, NativeStepRunner)
    sequences = [Sequence(some_ids(60, seed), params, Reader()) for seed, params in enumerate(PARAMS)]
    with no_torch_operations():
        for slot, sequence in enumerate(sequences):
            sequence.slot = slot
            assert runner.run(Step(sequence, sequence.prompt_ids[:48])) == []
            sequence.position = 48
            runner.start_sampling(sequence)
            (found,) = runner.run(Step(sequence, sequence.prompt_ids[48:]))
            sequence.output_ids += only_tokens(found)
            sequence.position = 60
        for _ in range(5):
            tokens = runner.run(Step(decoding=[DecodeRows(sequence, [7, 8]) for sequence in sequences]))
            for sequence, found in zip(sequences, tokens, strict=True):
                sequence.output_ids += only_tokens(found)
                sequence.position += len(found)
    assert all(len(sequence.output_ids) >= 6 for sequence in sequences)


def test_the_check_notices_torch_operations(checkpoint: MakeCheckpoint) -> None:
    """The reference sampler uses torch."""
    runner = HostStepRunner(load(checkpoint(dtype=torch.float16), cpu_kernels="auto"))
    sequence = Sequence(some_ids(5), GenerationParams(8), Reader())
    sequence.slot = 0
    with pytest.raises(AssertionError, match="torch operation"), no_torch_operations():
        runner.prefill(sequence, sequence.prompt_ids)


def test_the_reference_samples_if_the_model_runs_in_torch(checkpoint: MakeCheckpoint) -> None:
    """Without native kernels there is no native sampling."""
    assert isinstance(host_step_runner(load(checkpoint(dtype=torch.float16))), HostStepRunner)


@pytest.mark.parametrize("cpu_kernels", ["auto", "torch"])
def test_logits_that_are_not_finite_fail_the_sequence(checkpoint: MakeCheckpoint, cpu_kernels: str) -> None:
    """The engine reports FAILED, and the slot works again."""
    model = load(checkpoint(dtype=torch.float16), cpu_kernels=cpu_kernels)
    weights = model.weights.norm.clone()
    engine, broken, intact = Engine(model, frozenset()), Reader(), Reader()
    model.weights.norm.fill_(float("nan"))
    engine.submit(some_ids(5), PARAMS[0], broken)
    assert broken.result() == SequenceResult(FinishReason.FAILED, 5, 0)
    model.weights.norm.copy_(weights)
    engine.submit(some_ids(5), PARAMS[0], intact)
    assert intact.result() == SequenceResult(FinishReason.MAX_TOKENS, 5, 8)
    engine.close()
