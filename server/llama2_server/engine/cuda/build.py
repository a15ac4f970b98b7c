"""Build the step runner of a model; on CUDA, verify its kernels before the server accepts requests."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError, OutOfMemory, WeightsError
from llama2_server.engine.memory import LOWER_MEMORY_USE
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import HostStepRunner, StepRunner, host_step_runner

logger = logging.getLogger(__name__)

MAX_RELATIVE_ERROR = 0.02  # of the logits compared with plain torch; float16 rounding alone causes a few thousandths
VERIFICATION_TOKENS = 48
FUSED_VERIFICATION_TOKENS = (48, 1000)  # the second number has several splits of the attention
GRAPH_REPLAYS = 3

GpuKernels = Literal["auto", "fused", "torch"]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps token ids, slots and positions, each (rows,), to float32 logits (rows, vocab_size)."""


def build_step_runner(model: LlamaModel, *, kernels: GpuKernels, cache_directory: Path | None) -> StepRunner:
    """Return the fastest available step runner; if CUDA runs in plain torch, one log record gives the reason.

    "fused" adds the kernels that have not run on a GPU (`cuda/fused/`); if they are not proven, "auto" is used.
    Compiled kernels and autotuning results are cached under `cache_directory` for the next start. On CUDA, a prompt of
    the full context is prefilled once.

    Raises:
        WeightsError: such a prompt does not fit into the memory of the card.
    """
    if model.device.type != "cuda":
        return host_step_runner(model)
    step_runner = _cuda_or_torch_step_runner(model, kernels=kernels, cache_directory=cache_directory)
    prefill_full_context(model)
    return step_runner


def prefill_full_context(model: LlamaModel) -> None:
    """Prefill the longest prompt in the engine's chunks, so that a long prompt cannot be the first to need the memory.

    Raises:
        WeightsError: the device is out of memory.
    """
    token_ids = [1 + index % (model.vocab_size - 1) for index in range(model.context_length)]
    try:
        for start in range(0, model.context_length, model.prefill_chunk_tokens):
            model.prefill(0, token_ids[start : start + model.prefill_chunk_tokens], start)
    except OutOfMemory as error:
        raise WeightsError(
            f"a prompt of {model.context_length} tokens does not fit on {model.device} next to the weights and the KV "
            f"cache: {error}; {LOWER_MEMORY_USE}"
        ) from error


def _cuda_or_torch_step_runner(model: LlamaModel, *, kernels: GpuKernels, cache_directory: Path | None) -> StepRunner:
    if kernels == "torch":
        logger.warning("running in plain torch, which is slower: --gpu-kernels is torch")
        return HostStepRunner(model)
    try:
        return _build_cuda_step_runner(model, cache_directory, fused=kernels == "fused")
    except Exception as error:  # the compiler, the driver and the device raise many types
        logger.warning("running in plain torch, which is slower: %s: %s", type(error).__name__, error)
        logger.debug("building the CUDA step runner failed", exc_info=error)
    torch.cuda.empty_cache()
    return HostStepRunner(model)


def _build_cuda_step_runner(model: LlamaModel, cache_directory: Path | None, *, fused: bool) -> StepRunner:
    if cache_directory:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_directory / "triton"))
    started_at = time.monotonic()
    # Imported late: these modules import Triton, which reads its environment on import and is missing without CUDA.
    import triton

    from llama2_server.engine.cuda.autotune import autotune
    from llama2_server.engine.cuda.forward import CudaForward
    from llama2_server.engine.cuda.matmul import Matmul
    from llama2_server.engine.cuda.step_runner import CudaStepRunner

    with torch.inference_mode():
        variants = autotune(model, cache_directory / "matmul_variants.json" if cache_directory else None)
        forward: Forward = CudaForward(model, Matmul(model.config.rms_norm_eps, variants))
        error = verify_logits(model, forward)
        choices = {"triton": triton.__version__, "matmul variants": str(sorted(variants.items()))}
        proven = proven_fused_forward(model, variants) if fused else None
        if proven:
            forward, choices = proven, choices | {"fused kernels": "1"}
    step_runner = CudaStepRunner(model, forward, choices)
    graphs = step_runner.capture_graphs()
    seconds = time.monotonic() - started_at
    logger.info("captured %d CUDA graphs in %.1f s; relative error of the logits: %.4f", graphs, seconds, error)
    return step_runner


def proven_fused_forward(model: LlamaModel, variants: dict[str, Any]) -> Forward | None:
    """Return the fused forward pass if its logits equal torch's; otherwise warn and return None.

    It is proven in a CUDA graph that is replayed, as the steps run it: there its kernels overlap.
    """
    from llama2_server.engine.cuda.fused.forward import FusedForward

    try:
        forward = FusedForward(model, variants)
        for tokens in FUSED_VERIFICATION_TOKENS:
            error = verify_logits(model, _in_graph(forward), tokens)
            logger.info("relative error of the fused kernels at %d tokens: %.4f", tokens, error)
    except Exception as reason:  # the compiler, the driver and the device raise many types
        logger.warning("running without the fused kernels: %s: %s", type(reason).__name__, reason)
        return None
    return forward


def _in_graph(forward: Forward) -> Forward:
    """Return a forward pass that runs as a new CUDA graph, several times in a row."""

    def replayed(token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        forward(token_ids, slots, positions)  # compile
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward(token_ids, slots, positions)
        for _ in range(GRAPH_REPLAYS):
            graph.replay()
        return logits

    return replayed


def verify_logits(model: LlamaModel, forward: Forward, tokens: int = VERIFICATION_TOKENS) -> float:
    """Return the relative error of a step's logits after up to `tokens` tokens, compared with the model's own.

    Raises:
        EngineError: the error is too large or not a number.
    """
    # One row and several rows use different kernels.
    errors = [relative_error(model, forward, rows, tokens) for rows in sorted({1, model.slots})]
    if not all(error < MAX_RELATIVE_ERROR for error in errors):  # not max(errors), which can ignore NaN
        raise EngineError(f"logits of the CUDA kernels differ from plain torch by {errors}, limit {MAX_RELATIVE_ERROR}")
    return max(errors)


def relative_error(model: LlamaModel, forward: Forward, rows: int, tokens: int) -> float:
    """Return the norm of the logits' difference from the model's own logits, divided by the norm of those."""
    slots = list(range(rows))
    prompt = [1 + index % (model.vocab_size - 1) for index in range(min(tokens, model.context_length - 1))]
    for slot in slots:
        model.prefill(slot, prompt[slot % len(prompt) :], 0)
    positions = [len(prompt) - slot % len(prompt) for slot in slots]
    token_ids = [prompt[slot % len(prompt)] for slot in slots]
    expected = model.decode(slots, token_ids, positions).double()  # (rows, vocab_size)
    inputs = [torch.tensor(numbers, device=model.device) for numbers in (token_ids, slots, positions)]
    return float((forward(*inputs).double() - expected).norm() / expected.norm())
