"""The proof of the fused kernels at the start: each is used only if it gives the results of torch on this device."""

import functools
import hashlib
import itertools
import logging
import math
import random
from pathlib import Path

import torch
from torch import Tensor

from llama2_server.engine.cuda.fused.forward import FusedForward
from llama2_server.engine.cuda.fused.sampling_kernels import FusedSampler
from llama2_server.engine.cuda.fused.step import FusedStep
from llama2_server.engine.cuda.matmul import MatmulVariant
from llama2_server.engine.cuda.step_runner import ForwardFunction, StepKernels, batch_sizes, sampling_state
from llama2_server.engine.cuda.verification import verify_logits
from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.llama import LlamaModel

logger = logging.getLogger(__name__)

VERIFICATION_TOKENS = (48, 1000)  # the second number has several splits of the attention
GRAPH_REPLAYS = 3
# Sampling parameters of the rows of a proof: temperature, top_k, top_p and the three penalties.
SAMPLING_CASES: tuple[tuple[float, ...], ...] = (
    (0.6, 0, 0.9, 1.0, 0.0, 0.0),  # a request without parameters
    (0.0, 0, 0.9, 1.0, 0.0, 0.0),
    (0.0, 0, 0.9, 1.3, 0.5, 0.2),
    (1.0, 0, 1.0, 1.0, 0.0, 0.0),
    (0.8, 40, 1.0, 1.0, 0.0, 0.0),
    (1.2, 100, 0.95, 1.2, 0.4, -0.3),
    (5.0, 0, 0.999, 1.0, 0.0, 0.0),  # a nucleus of nearly the whole vocabulary
)
SAMPLING_STEPS = 4  # penalties depend on the tokens before
LOGIT_SCALES = (0.3, 3.0, 0.0, math.nan)
SamplingCase = tuple[float, ...]


def proven_fused_step(
    model: LlamaModel, variants: dict[str, MatmulVariant], fallback: StepKernels
) -> tuple[StepKernels, dict[str, str]]:
    """Return the fused kernels that equal torch's, and their entries in the fingerprint; else warn, and the fallback.

    They are proven in CUDA graphs that are replayed, as the steps run them: there they overlap.
    """
    try:
        forward = FusedForward(model, variants)
        for tokens in VERIFICATION_TOKENS:
            error = verify_logits(model, _in_graph(forward), tokens)
            logger.info("relative error of the fused kernels at %d tokens: %.4f", tokens, error)
    except Exception as reason:  # the compiler, the driver and the device raise many types
        logger.warning("running without the fused kernels: %s: %s", type(reason).__name__, reason)
        return fallback, {}
    return proven_sampling(model, forward)


def proven_sampling(model: LlamaModel, forward: FusedForward) -> tuple[StepKernels, dict[str, str]]:
    """Return the step, with fused sampling if its tokens equal torch's, and its entries in the fingerprint."""
    choices = {"fused kernels": _source_digest()}
    try:
        rows = batch_sizes(model.slots)[-1]
        step = FusedStep(forward, FusedSampler(rows, model.vocab_size, model.device, forward.options))
        verify_tokens(model, step)
    except Exception as reason:  # as above
        logger.warning("running without the fused sampling: %s: %s", type(reason).__name__, reason)
        return FusedStep(forward, None), choices
    logger.info("the fused sampling gives the tokens of torch")
    return step, choices | {"fused sampling": "1"}


def verify_tokens(model: LlamaModel, kernels: StepKernels) -> None:
    """Sample with the kernels and in torch, from logits that are close together, far apart, equal or not finite.

    Raises:
        EngineError: a token differs.
    """
    largest = batch_sizes(model.slots)[-1]
    batches = [[case] for case in SAMPLING_CASES] + [list(itertools.islice(itertools.cycle(SAMPLING_CASES), largest))]
    for cases, scale in itertools.product(batches, LOGIT_SCALES):
        expected = _sampled(model, StepKernels(kernels.forward), cases, scale, in_graphs=False)
        # Outside of a graph first: this compiles the kernels.
        for in_graphs in (False, True) if model.device.type == "cuda" else (False,):
            found = _sampled(model, kernels, cases, scale, in_graphs=in_graphs)
            if found != expected:
                raise EngineError(f"tokens of the fused sampling differ from torch's: {found} instead of {expected}")


def _sampled(
    model: LlamaModel, kernels: StepKernels, cases: list[SamplingCase], scale: float, *, in_graphs: bool
) -> list[list[int]]:
    """Return the tokens of several steps, of which the last one is greedy."""
    rows, state, found = len(cases), sampling_state(model), []
    numbers, generator = random.Random(rows), torch.Generator().manual_seed(rows)  # noqa: S311 - no secret
    slots = [min(row, model.slots) for row in range(rows)]
    for slot in set(slots):
        state.penalties.reset(slot, [1, 2, 3])
    for step in range(SAMPLING_STEPS + 1):
        table = [(slot, 0, *case, numbers.random()) for slot, case in zip(slots, cases, strict=True)]
        logits = torch.randn(rows, model.vocab_size, generator=generator)
        logits = logits * scale if math.isfinite(scale) else logits.index_fill(1, torch.tensor([5]), scale)
        inputs = logits.to(model.device), torch.tensor(table, dtype=torch.float64, device=model.device)
        sample = functools.partial(kernels.sample, *inputs, state, step == SAMPLING_STEPS)
        if in_graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sample()
            graph.replay()
        else:
            sample()
        found.append(state.token_ids[:rows].tolist())
    return found


def _in_graph(forward: ForwardFunction) -> ForwardFunction:
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


def _source_digest() -> str:
    """Return a digest of the fused kernels: a change of their source can change the bits of a result."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
