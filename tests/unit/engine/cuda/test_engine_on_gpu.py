"""Tests that need a GPU: rows that share a step, reuse of a prefix, other kinds of steps, and two processes."""

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.gpu.engines import (
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
from tests.support.repository import ROOT
from tests.support.sampling.token_reader import Reader

from llama2_server.engine.cuda.build import build_step_runner
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult
from llama2_server.engine.step_runner import HostStepRunner

DEVICE = "cuda"
CHUNK = 64
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no NVIDIA GPU found"),
    pytest.mark.timeout(300),  # kernels are compiled
]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_row_alone_and_among_16(checkpoint: MakeCheckpoint, shape: dict[str, Any]) -> None:
    """Libraries compute several rows in another order, so only near ties may differ; no row gets another's tokens."""
    directory = checkpoint(dtype=torch.float16, **shape)
    prompts = [some_ids(10 + 7 * seed, seed) for seed in range(SLOTS)]
    with running(load(directory, DEVICE)) as engine, torch.inference_mode():
        alone = [generated(engine, [prompt], max_tokens=40)[0] for prompt in prompts]
        repeated = [generated(engine, [prompt], max_tokens=40)[0] for prompt in prompts]
        shared = generated(engine, prompts, max_tokens=40)
        assert alone == repeated
        model = reference(directory, torch.float16, DEVICE)
        for prompt, found, expected in zip(prompts, shared, alone, strict=True):
            assert_same_except_ties(model, prompt, found, expected)


class CancellingReader(Reader):
    """A reader that cancels after some tokens, while the next step is in progress, and then sends a second prompt."""

    def __init__(self, engine: Engine, count: int, prompt: list[int]) -> None:
        super().__init__()
        self._engine, self._count, self._prompt = engine, count, prompt
        self.sequence: Future[Sequence] = Future()
        self.second = Reader()

    def on_token(self, token_id: int) -> bool:
        """Store the token; the last one cancels."""
        super().on_token(token_id)
        if len(self.token_ids) == self._count:
            self.sequence.result(timeout=60).cancel()
            self._engine.submit(self._prompt, GenerationParams(30, temperature=0), self.second, "scope")
        return False


@pytest.mark.parametrize("count", [2, 3, 17])
def test_a_prefix_is_reused_while_a_cancelled_step_is_in_progress(checkpoint: MakeCheckpoint, count: int) -> None:
    """The step of the cancelled reply still writes to the slot; the next reply has the tokens of a fresh engine."""
    directory = checkpoint(dtype=torch.float16, **SHAPES["grouped"])
    first, second = some_ids(200, 1), [*some_ids(200, 1)[:150], *some_ids(40, 2)]
    with running(load(directory, DEVICE, slots=1), prefill_chunk_tokens=CHUNK) as engine:
        expected = generated(engine, [second], max_tokens=30)[0]
        reader = CancellingReader(engine, count, second)
        reader.sequence.set_result(engine.submit(first, GenerationParams(200, temperature=0), reader, "scope"))
        assert reader.result() == SequenceResult(FinishReason.CANCELLED, 200, count)
        assert reader.second.result() == SequenceResult(FinishReason.MAX_TOKENS, 190, 30, 2 * CHUNK)
        assert reader.second.token_ids == expected


def test_a_failed_capture_falls_back_to_torch(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that waits for the host cannot be captured; the server warns, serves in torch, and loses no memory."""
    from llama2_server.engine.cuda.forward import CudaForward

    directory = checkpoint(dtype=torch.float16, **SHAPES["multi-head"])
    model, computed = load(directory, DEVICE), CudaForward.__call__

    def waiting(self: CudaForward, *rows: torch.Tensor) -> torch.Tensor:
        logits = computed(self, *rows)
        if torch.cuda.is_current_stream_capturing():
            logits[0, 0].item()
        return logits

    monkeypatch.setattr(CudaForward, "__call__", waiting)
    allocated = torch.cuda.memory_allocated()
    with caplog.at_level(logging.WARNING):
        runner = build_step_runner(model, kernels="auto", cache_directory=None)
    assert isinstance(runner, HostStepRunner)
    assert "running in plain torch, which is slower: " in caplog.text
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= allocated + 2**20
    prompt = some_ids(60, 3)
    with running(model, runner=runner) as engine, torch.inference_mode():
        found = generated(engine, [prompt])[0]
    oracle = reference(directory, torch.float16, DEVICE)
    with torch.inference_mode():
        assert_same_except_ties(oracle, prompt, found, reference_tokens(oracle, prompt, 24))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_plain_torch_on_the_device(checkpoint: MakeCheckpoint, shape: dict[str, Any]) -> None:
    """HostStepRunner, the fallback: prompts in several chunks give transformers' tokens, and a seed repeats."""
    directory = checkpoint(dtype=torch.float16, **shape)
    model = reference(directory, torch.float16, DEVICE)
    prompts = [some_ids(count, count) for count in (1, 63, 64, 65, 300)]
    with running(load(directory, DEVICE), "torch", prefill_chunk_tokens=CHUNK) as engine, torch.inference_mode():
        for prompt, found in zip(prompts, generated(engine, prompts), strict=True):
            assert_same_except_ties(model, prompt, found, reference_tokens(model, prompt, 24))
        one, two, other = (generated(engine, prompts[:1], temperature=1.0, seed=seed)[0] for seed in (1, 1, 2))
        assert one == two != other


def test_two_processes_share_one_card(checkpoint: MakeCheckpoint) -> None:
    """Both prepare their steps, generate at the same time, and give the tokens of a process that is alone."""
    directory = checkpoint(dtype=torch.float16, **SHAPES["grouped"])
    with running(load(directory, DEVICE), "auto" if DEVICE == "cuda" else "torch") as engine:
        expected = generated(engine, [some_ids(50, 1)], temperature=0.8, max_tokens=60)[0]
    rounds = 20
    processes = [_generating(directory, rounds) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in processes:  # both are ready
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            output, _ = process.communicate()
            assert process.returncode == 0
            assert [json.loads(line) for line in output.splitlines()] == [expected] * rounds
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _generating(directory: Path, rounds: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.support.gpu.generate", str(directory), DEVICE, str(rounds)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
