"""Compute the engine's steps: the forward pass of a model and the sampling of its tokens.

This module samples on the host: in C++ as a part of the native step, or in torch with the reference sampler.
`cuda/step_runner.py` samples on the device.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from llama2_server.engine.errors import NonFiniteLogits
from llama2_server.engine.model.interface import Model
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_decoder import NativeDecoder, SlotTokens
from llama2_server.engine.model.native_sampler import NO_TOKEN, NativeSampler
from llama2_server.engine.sampling import Sampler
from llama2_server.engine.sequence import Sequence, TokenOrError
from llama2_server.engine.step_planner import DecodeRows, Step


class StepKind(StrEnum):
    """How the steps are computed; logs, metrics and GetModelCard report it."""

    NATIVE = "native"
    """C++ on the CPU."""
    TORCH = "torch"
    """Plain torch, which is slower."""
    CUDA_GRAPHS = "cuda_graphs"
    """Custom kernels in CUDA graphs."""


class SeparateStepRunner(Protocol):
    """Runs prefill and decode steps of a model and samples their tokens."""

    @property
    def kind(self) -> StepKind:
        """How the steps are computed."""

    @property
    def lookahead(self) -> int:
        """Number of steps that may be in progress while the tokens of an earlier step are read."""

    @property
    def kernel_choices(self) -> dict[str, str]:
        """The choices that this start has made and that can change bits, for the fingerprint."""

    def prefill(self, sequence: Sequence, chunk: list[int]) -> Iterable[TokenOrError]:
        """Start to append `chunk` of the sequence's prompt to its slot.

        Return no token, or one token after the last chunk. The iterable may be read once, and the first read waits for
        the device. An exception means that no step was started.
        """

    def decode(self, rows: SequenceOf[Sequence]) -> Iterable[TokenOrError]:
        """Start to append each row's last token to its slot.

        Return one token per row, in the order of `rows`. Reads and exceptions work as in `prefill`.
        """


class HostStepRunner:
    """A step runner that samples with the reference sampler, one row after another."""

    kind = StepKind.TORCH
    lookahead = 0  # because the next step needs the tokens of this one

    def __init__(self, model: Model) -> None:
        self._model = model
        self.kernel_choices: dict[str, str] = {}

    def prefill(self, sequence: Sequence, chunk: list[int]) -> Iterable[TokenOrError]:
        """Prefill `chunk` and sample a token after the last chunk, as in `StepRunner.prefill`."""
        logits = self._model.prefill(sequence.slot, chunk, sequence.position)  # (vocab_size,)
        if sequence.position + len(chunk) < len(sequence.prompt_ids):
            return ()
        return self._sample([sequence], [logits])

    def decode(self, rows: SequenceOf[Sequence]) -> Iterable[TokenOrError]:
        """Append the last token of each row and sample the next tokens, as in `StepRunner.decode`."""
        logits = self._model.decode(  # (rows, vocab_size)
            [sequence.slot for sequence in rows],
            [sequence.output_ids[-1] for sequence in rows],
            [sequence.position for sequence in rows],
        )
        return self._sample(rows, logits.unbind())

    def _sample(self, rows: SequenceOf[Sequence], logits: Iterable[Tensor]) -> Iterator[TokenOrError]:
        for sequence, row in zip(rows, logits, strict=True):  # (vocab_size,)
            try:
                if sequence.sampler is None:
                    sequence.sampler = Sampler(sequence.params, sequence.prompt_ids, self._model.vocab_size, row.device)
                yield sequence.sampler.sample(row)
            except Exception as error:  # fails this row only
                yield error


class NativeStepRunner:
    """A step runner that samples as a part of the native step; it uses no torch operation per token.

    Its steps combine a part of a prompt with the tokens and the guesses of all decoding sequences. This never changes a
    token, because each row has the same bits in every step.
    """

    kind = StepKind.NATIVE

    def __init__(self, decoder: NativeDecoder) -> None:
        self._decoder = decoder
        self.kernel_choices: dict[str, str] = {}
        self._samplers: dict[int, NativeSampler] = {}  # by slot

    @property
    def max_rows(self) -> int:
        """Number of rows that a step can have."""
        return self._decoder.max_rows

    def start_sampling(self, sequence: Sequence) -> None:
        """Prepare to sample the sequence's tokens; needed before the step that completes its prompt.

        Raises:
            EngineError: there is not enough memory.
        """
        self._samplers[sequence.slot] = NativeSampler(sequence.params, sequence.prompt_ids, self._decoder.vocab_size)

    def run(self, step: Step) -> list[list[TokenOrError]]:
        """Run a step, and return the tokens of each sequence that gets some.

        The first is the sequence whose prompt the step completes, if any. A decoding sequence gets one token more than
        it has right guesses. An exception means that no sequence got a token.
        """
        parts = [*_prompt_parts(step, self._samplers), *(self._decoding(rows) for rows in step.decoding)]
        return [_tokens_or_errors(token_ids) for token_ids in self._decoder.sample(parts)]

    def _decoding(self, rows: DecodeRows) -> SlotTokens:
        sequence = rows.sequence
        token_ids = [sequence.output_ids[-1], *rows.guesses]
        return SlotTokens(sequence.slot, token_ids, sequence.position, self._samplers[sequence.slot])


StepRunner = SeparateStepRunner | NativeStepRunner
"""Runs the engine's steps: prompts and decoding sequences in separate steps, or combined."""


def host_step_runner(model: Model) -> StepRunner:
    """Return the step runner with native sampling if the model runs natively, otherwise with the reference sampler."""
    if isinstance(model, LlamaModel) and model.native:
        return NativeStepRunner(model.native)
    return HostStepRunner(model)


def _prompt_parts(step: Step, samplers: dict[int, NativeSampler]) -> list[SlotTokens]:
    """Return the parts of the prompt: only its last token is sampled."""
    if step.prompt is None:
        return []
    slot, position = step.prompt.slot, step.prompt.position
    if not step.completes_prompt:
        return [SlotTokens(slot, step.chunk, position)]
    before = len(step.chunk) - 1
    last = SlotTokens(slot, step.chunk[before:], position + before, samplers[slot])
    return [SlotTokens(slot, step.chunk[:before], position), last] if before else [last]


def _tokens_or_errors(token_ids: list[int]) -> list[TokenOrError]:
    return [NonFiniteLogits() if token_id == NO_TOKEN else token_id for token_id in token_ids]
