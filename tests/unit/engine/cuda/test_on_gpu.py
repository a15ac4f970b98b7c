"""Tests that need a GPU: CUDA graphs, arithmetic and memory. `make bench-gpu` runs them."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.gpu.engines import (
    CONTEXT,
    NO_EOS,
    SHAPES,
    SLOTS,
    MakeCheckpoint,
    assert_same_except_ties,
    generated,
    load,
    reference,
    reference_tokens,
    running,
    some_ids,
)
from tests.support.sampling.token_reader import Reader
from torch import Tensor

from llama2_server.engine.cuda.step_runner import CudaStepRunner, StepKernels
from llama2_server.engine.cuda.verification import verify_logits
from llama2_server.engine.engine import Engine
from llama2_server.engine.errors import EngineError
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, SequenceResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no NVIDIA GPU found"),
    pytest.mark.timeout(300),  # kernels are compiled
]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_greedy_tokens_match_transformers(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], dtype: torch.dtype
) -> None:
    """On the device, 16 at once, for prompts from one token to nearly the full context."""
    directory = checkpoint(dtype=dtype, **shape)
    model = reference(directory, dtype)
    prompts = [some_ids(count, count) for count in (1, 2, 17, 64, 127, 129, 300, CONTEXT - 24)] * 2
    with running(load(directory, dtype=dtype)) as engine, torch.inference_mode():
        for prompt, found in zip(prompts, generated(engine, prompts), strict=True):
            assert_same_except_ties(model, prompt, found, reference_tokens(model, prompt, 24))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float16_logits_match_float32_on_the_cpu(checkpoint: MakeCheckpoint, shape: dict[str, Any]) -> None:
    """The relative Euclidean error is below 0.5%, for the prefill and for a step of the custom kernels."""
    from llama2_server.engine.cuda.forward import CudaForward
    from llama2_server.engine.cuda.matmul import Matmul

    directory = checkpoint(dtype=torch.float16, **shape)
    model, exact = load(directory), load(directory, "cpu", torch.float32)
    prompt = some_ids(200, 1)
    found, expected = model.prefill(3, prompt, 0), exact.prefill(3, prompt, 0)
    assert relative_error(found, expected) < 0.005
    rows = [torch.tensor([number], device="cuda") for number in (7, 3, 200)]
    with torch.inference_mode():
        step = CudaForward(model, Matmul(model.config.rms_norm_eps))(*rows)
    assert relative_error(step, exact.decode([3], [7], [200])) < 0.005


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm())


def test_a_seed_repeats(checkpoint: MakeCheckpoint) -> None:
    """The same seed gives the same tokens on the same device with one row; another seed gives others."""
    with running(load(checkpoint(dtype=torch.float16, **SHAPES["grouped"]))) as engine:
        results = []
        for seed in (1, 1, 2):
            reader = Reader()
            engine.submit(some_ids(20, 0), GenerationParams(60, temperature=1.0, seed=seed), reader)
            reader.result()
            results.append(reader.token_ids)
    assert results[0] == results[1] != results[2]


def test_draws_follow_the_distribution(checkpoint: MakeCheckpoint) -> None:
    """The second tokens of 3,200 replies, 16 per graph, follow their exact probabilities."""
    directory = checkpoint(dtype=torch.float32, **SHAPES["multi-head"])
    model = load(directory, dtype=torch.float32)
    prompt, params = some_ids(8, 0), GenerationParams(2, temperature=1.3, top_k=6, top_p=0.95)
    exact = load(directory, "cpu", torch.float32)
    exact.prefill(0, prompt, 0)
    drawn: dict[int, list[int]] = {}
    with running(model) as engine:
        seeds = random.Random(0)
        for _ in range(200):
            readers = [Reader() for _ in range(SLOTS)]
            for reader in readers:
                engine.submit(prompt, replace(params, seed=seeds.getrandbits(64)), reader)
            for reader in readers:
                reader.result()
                drawn.setdefault(reader.token_ids[0], []).append(reader.token_ids[1])
    first, seconds = max(drawn.items(), key=lambda item: len(item[1]))
    logits = exact.decode([0], [first], [len(prompt)])[0].double() / 1.3
    top = logits.topk(6)
    weights = top.values.softmax(0)
    weights = weights * (weights.cumsum(0) - weights < 0.95)
    counts = torch.tensor([seconds.count(int(token_id)) for token_id in top.indices])
    assert counts.sum() == len(seconds)
    used = weights > 0
    assert counts[~used].sum() == 0
    expected = (weights / weights.sum() * len(seconds))[used]
    statistic = ((counts[used] - expected) ** 2 / expected).sum()
    p_value = torch.special.gammaincc((used.sum() - 1) / 2, statistic / 2)  # of Pearson's chi-square test
    assert p_value > 1e-3


def test_graphs_compute_the_same_tokens_as_the_eager_step(checkpoint: MakeCheckpoint) -> None:
    """Tokens are the same with and without graphs, and the logits match plain torch except for rounding."""
    from llama2_server.engine.cuda.forward import CudaForward
    from llama2_server.engine.cuda.matmul import Matmul

    model = load(checkpoint(dtype=torch.float16, **SHAPES["grouped"]))
    forward = CudaForward(model, Matmul(model.config.rms_norm_eps))
    with torch.inference_mode():
        assert verify_logits(model, forward) < 0.01
    results = []
    for captured in (False, True):
        step_runner = CudaStepRunner(model, StepKernels(forward))
        if captured:
            assert step_runner.capture_graphs() == 10  # 1, 2, 4, 8, 16 rows, greedy and sampled
        engine, readers = Engine(model, NO_EOS, step_runner=step_runner), [Reader() for _ in range(5)]
        for seed, reader in enumerate(readers):
            params = GenerationParams(40, temperature=0.9 * (seed % 2), seed=seed, repetition_penalty=1.0 + seed / 10)
            engine.submit(some_ids(9, seed), params, reader)
            reader.result()
        results.append([reader.token_ids for reader in readers])
        assert engine.close(timeout_seconds=60)
    assert results[0] == results[1]


def test_nan_logits_fail_their_sequence(checkpoint: MakeCheckpoint) -> None:
    """A NaN embedding row fails only the reply that uses it."""
    model = load(checkpoint(dtype=torch.float16, **SHAPES["multi-head"]))
    with running(model) as engine:
        model.weights.embedding[599] = float("nan")
        broken, intact = Reader(), Reader()
        engine.submit([5, 599, 6], GenerationParams(9, temperature=0), broken)
        engine.submit([5, 7, 6], GenerationParams(9, temperature=0), intact)
        assert broken.result() == SequenceResult(FinishReason.FAILED, 3, 0)
        assert intact.result().reason is FinishReason.MAX_TOKENS


def test_a_prefill_that_runs_out_of_memory_releases_it(checkpoint: MakeCheckpoint) -> None:
    """The prefill fails with a clear message, its memory is released, and the next prompt runs."""
    model = load(checkpoint(dtype=torch.float16, **SHAPES["multi-head"]), slots=1)
    model.prefill(0, some_ids(8, 0), 0)
    torch.cuda.empty_cache()
    baseline = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((baseline + 2**21) / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(EngineError, match="out of memory in a prefill of 500 tokens"):
            model.prefill(0, some_ids(500, 0), 0)
        assert torch.cuda.memory_allocated() == baseline
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    model.prefill(0, some_ids(500, 0), 0)


def test_weights_on_the_device_equal_the_stored_weights(checkpoint: MakeCheckpoint) -> None:
    """Weights pass through pinned memory in blocks; the device converts them if the card needs another precision."""
    for stored, dtype in ((torch.float16, torch.float16), (torch.float32, torch.float16)):
        directory = checkpoint(dtype=stored, **SHAPES["sharded"])
        found, expected = load(directory, dtype=dtype).weights, load(directory, "cpu", dtype).weights
        assert torch.equal(found.embedding.cpu(), expected.embedding)
        for found_layer, expected_layer in zip(found.layers, expected.layers, strict=True):
            for name in ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down"):
                assert torch.equal(getattr(found_layer, name).cpu(), getattr(expected_layer, name))
