"""A complete step from the fused kernels; each one overlaps with the kernel before it on cards that can do this."""

from torch import Tensor

from llama2_server.engine.cuda.fused.forward import FusedForward
from llama2_server.engine.cuda.fused.sampling_kernels import FusedSampler
from llama2_server.engine.cuda.step_runner import SamplingState, StepKernels


class FusedStep(StepKernels):
    """The fused forward pass, and the fused sampler unless it is None; see `StepKernels`."""

    def __init__(self, forward: FusedForward, sampler: FusedSampler | None) -> None:
        super().__init__(forward)
        self._fused_forward = forward
        self._sampler = sampler

    def logits(self, table: Tensor, last_ids: Tensor) -> Tensor:  # (rows, COLUMNS), (slots + 1,) -> (rows, vocab_size)
        """Append each row's last token to its slot and return the logits after it."""
        return self._fused_forward.logits(table, last_ids)

    def sample(self, logits: Tensor, table: Tensor, state: SamplingState, argmax_only: bool) -> None:
        """Sample one token per row of the logits, (rows, vocab_size), and store it in the state."""
        if self._sampler:
            self._sampler(logits, table, state, argmax_only)
        else:
            super().sample(logits, table, state, argmax_only)
