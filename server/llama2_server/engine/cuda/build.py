"""Makes the fast steps of a model on a CUDA device, and proves them before anybody is served."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import HostStepRunner, StepRunner

logger = logging.getLogger(__name__)

MAX_RELATIVE_ERROR = 0.02  # of the logits, against the plain steps; float16 itself makes for a few thousandths
PROOF_TOKENS = 48


def build_step_runner(model: LlamaModel, *, compiled: bool, cache_directory: Path | None) -> StepRunner:
    """The fastest steps to be had; where it is not the fast ones on CUDA, the log says why in one line.

    What is compiled and measured is kept under `cache_directory`, so that the next start need not do it again.
    """
    if model.device.type != "cuda":
        return HostStepRunner(model)
    if not compiled:
        logger.info("running in plain torch, which is slower: the settings ask for it (gpu_kernels)")
        return HostStepRunner(model)
    try:
        return _fast_steps(model, cache_directory)
    except Exception as error:  # of the compiler, the driver or the device, in whatever form
        logger.warning("running in plain torch, which is slower: %s: %s", type(error).__name__, error)
        logger.debug("why the fast steps cannot be had", exc_info=error)
    torch.cuda.empty_cache()
    return HostStepRunner(model)


def _fast_steps(model: LlamaModel, cache_directory: Path | None) -> StepRunner:
    if cache_directory:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_directory / "triton"))
    begun = time.monotonic()
    # Imports Triton, which reads its environment then, and is not there without CUDA.
    from llama2_server.engine.cuda.autotune import autotune
    from llama2_server.engine.cuda.forward import Forward
    from llama2_server.engine.cuda.matmul import Matmul
    from llama2_server.engine.cuda.step_runner import CudaStepRunner

    with torch.inference_mode():
        ways = autotune(model, cache_directory / "ways.json" if cache_directory else None)
        forward = Forward(model, Matmul(model.config.rms_norm_eps, ways))
        error = proven_error(model, forward)
    step_runner = CudaStepRunner(model, forward)
    graphs = step_runner.capture()
    logger.info("made %d CUDA graphs in %.1f s; logits within %.4f", graphs, time.monotonic() - begun, error)
    return step_runner


def proven_error(model: LlamaModel, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """How far the logits of a step are from the model's own; raises EngineError where it is too far, or no number."""
    # One row and several are computed in different ways.
    errors = [relative_error(model, forward, rows) for rows in sorted({1, model.slots})]
    if not all(error < MAX_RELATIVE_ERROR for error in errors):  # each by itself: max() may pass over what is no number
        raise EngineError(f"the fast step's logits differ by {errors} from the plain step's")
    return max(errors)


def relative_error(model: LlamaModel, forward: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int) -> float:
    """How far the logits of a step are from the model's own: the norm of the difference over the norm."""
    slots = list(range(rows))
    prompt = [1 + index % (model.vocab_size - 1) for index in range(min(PROOF_TOKENS, model.context_length - 1))]
    for slot in slots:
        model.prefill(slot, prompt[slot % len(prompt) :], 0)
    positions = [len(prompt) - slot % len(prompt) for slot in slots]
    token_ids = [prompt[slot % len(prompt)] for slot in slots]
    expected = model.decode(slots, token_ids, positions).double()  # (rows, vocab_size)
    inputs = [torch.tensor(numbers, device=model.device) for numbers in (token_ids, slots, positions)]
    return float((forward(*inputs).double() - expected).norm() / expected.norm())
