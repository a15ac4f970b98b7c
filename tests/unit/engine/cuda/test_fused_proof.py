"""Tests of the proof of the fused kernels, with stand-ins for CUDA graphs; on the CPU in Triton's interpreter."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.cuda.step_runner import SamplingState, StepKernels
from llama2_server.engine.model.llama import LlamaModel

MakeCheckpoint = Callable[..., Path]


class Graph:
    """A stand-in for a CUDA graph, whose work is done when it is captured."""

    replays = 0

    def replay(self) -> None:
        """Count."""
        Graph.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """CUDA graphs that run at once."""
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", lambda graph: nullcontext())
    monkeypatch.setattr(Graph, "replays", 0)
    return Graph


@pytest.fixture
def small_model(checkpoint: MakeCheckpoint, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> LlamaModel:
    """A model of one layer and slot, and two splits, because the interpreter is slow."""
    from llama2_server.engine.cuda import attention_kernels
    from llama2_server.engine.cuda.fused import sampling_kernels

    monkeypatch.setattr(attention_kernels, "PROGRAMS_PER_ROW", 4)
    for name, value in {"BLOCK_TOKENS": 512, "PART_TOKENS": 512, "WAYS": 128}.items():
        monkeypatch.setattr(sampling_kernels, name, value)
    directory = checkpoint(heads=4, kv_heads=2, layers=1)
    return load_model(directory, device="cpu", dtype=torch.float32, context_length=128, slots=1, cpu_kernels="torch")


def wide_tiles(model: LlamaModel) -> dict[str, Any]:
    """Return tiles of many rows for all matmuls: the interpreter needs a long time for many programs."""
    from llama2_server.engine.cuda.matmul import matmul_name
    from llama2_server.engine.cuda.matmul_kernels import TileConfig

    layer = model.weights.layers[0]
    weights = {"rmsnorm_linear": [layer.qkv], "linear_residual": [layer.output, layer.down], "swiglu": [layer.gate_up]}
    weights["lm_head"] = [model.weights.head]
    return {matmul_name(kind, weight): TileConfig(64, 64, 4) for kind, found in weights.items() for weight in found}


@pytest.fixture
def proof(device: torch.device) -> Any:
    """The module; imported late, because it needs Triton."""
    from llama2_server.engine.cuda.fused import proof

    return proof


@pytest.fixture
def fallback(small_model: LlamaModel) -> StepKernels:
    """Kernels of torch."""

    def forward(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        return small_model.decode(slots.tolist(), token_ids.tolist(), positions.tolist())

    return StepKernels(forward)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN):RuntimeWarning")
@pytest.mark.timeout(300)  # the interpreter on a busy machine
def test_fused_kernels_are_proven_before_they_are_used(
    proof: Any, small_model: LlamaModel, fallback: StepKernels, graphs: type[Graph], caplog: pytest.LogCaptureFixture
) -> None:
    """With one split and with several, in replayed graphs; the logits and sampled tokens equal torch's.

    The fingerprint names the kernels by their source.
    """
    with caplog.at_level(logging.INFO), torch.inference_mode():
        kernels, choices = proof.proven_fused_step(small_model, wide_tiles(small_model), fallback)
    assert kernels._sampler
    assert choices == {"fused kernels": proof._source_digest(), "fused sampling": "1"}
    assert graphs.replays == 2 * proof.GRAPH_REPLAYS
    assert "relative error of the fused kernels at 1000 tokens: 0.0000" in caplog.text
    assert "the fused sampling gives the tokens of torch" in caplog.text


@pytest.mark.usefixtures("graphs")
def test_wrong_fused_kernels_are_not_used(
    proof: Any,
    small_model: LlamaModel,
    fallback: StepKernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning has the reason, and the server uses the other kernels."""
    from llama2_server.engine.cuda.fused.forward import FusedForward

    monkeypatch.setattr(FusedForward, "logits", lambda self, table, _: torch.ones(len(table), small_model.vocab_size))
    with torch.inference_mode():
        found = proof.proven_fused_step(small_model, wide_tiles(small_model), fallback)
    assert found == (fallback, {})
    assert "running without the fused kernels: EngineError: logits of the CUDA kernels differ" in caplog.text


def test_wrong_fused_sampling_is_not_used(
    proof: Any, small_model: LlamaModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One token that differs is enough: torch samples after the fused forward pass, and the fingerprint says so."""
    from llama2_server.engine.cuda.fused.forward import FusedForward
    from llama2_server.engine.cuda.fused.sampling_kernels import FusedSampler

    def almost(self: Any, logits: Tensor, table: Tensor, state: SamplingState, argmax_only: bool) -> None:
        StepKernels(lambda *_: logits).sample(logits, table, state, argmax_only)
        state.token_ids[0] += argmax_only

    monkeypatch.setattr(FusedSampler, "__call__", almost)
    with torch.inference_mode():
        kernels, choices = proof.proven_sampling(small_model, FusedForward(small_model, {}))
    assert kernels._sampler is None
    assert list(choices) == ["fused kernels"]
    assert "running without the fused sampling: EngineError: tokens of the fused sampling differ" in caplog.text
