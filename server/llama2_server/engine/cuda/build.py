"""Build the step runner of a model; on CUDA, verify its kernels before the server accepts requests."""

import logging
import os
import time
from pathlib import Path
from typing import Literal

import torch

from llama2_server.engine.cuda.verification import verify_logits
from llama2_server.engine.errors import OutOfMemory, WeightsError
from llama2_server.engine.memory import LOWER_MEMORY_USE
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import HostStepRunner, StepRunner, host_step_runner

logger = logging.getLogger(__name__)

GpuKernels = Literal["auto", "fused", "torch"]


def build_step_runner(model: LlamaModel, *, kernels: GpuKernels, cache_directory: Path | None) -> StepRunner:
    """Return the fastest available step runner; if CUDA runs in plain torch, one log record gives the reason.

    "fused" adds the kernels that were only tested one by one (`cuda/fused/`); if they are not proven, "auto" is used.
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
    from llama2_server.engine.cuda.step_runner import CudaStepRunner, StepKernels

    with torch.inference_mode():
        variants = autotune(model, cache_directory / "matmul_variants.json" if cache_directory else None)
        forward = CudaForward(model, Matmul(model.config.rms_norm_eps, variants))
        error = verify_logits(model, forward)
        choices = {"triton": triton.__version__, "matmul variants": str(sorted(variants.items()))}
        kernels = StepKernels(forward)
        if fused:
            from llama2_server.engine.cuda.fused.proof import proven_fused_step

            kernels, fused_choices = proven_fused_step(model, variants, kernels)
            choices |= fused_choices
    step_runner = CudaStepRunner(model, kernels, choices)
    graphs = step_runner.capture_graphs()
    seconds = time.monotonic() - started_at
    logger.info("captured %d CUDA graphs in %.1f s; relative error of the logits: %.4f", graphs, seconds, error)
    return step_runner
