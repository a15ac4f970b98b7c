"""Compute the engine's steps: the forward pass of a model and the sampling of its tokens.

This module samples on the host, one row after another. `cuda/step_runner.py` samples on the device.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from torch import Tensor

from llama2_server.engine.model.interface import Model
from llama2_server.engine.sampling import Sampler
from llama2_server.engine.sequence import Sequence

TokenOrError = int | Exception
"""A row's next token id, or the error that prevented it."""


class StepRunner(Protocol):
    """Runs prefill and decode steps of a model and samples their tokens."""

    @property
    def lookahead(self) -> int:
        """Number of steps that may be in progress while the tokens of an earlier step are read."""

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
    """A step runner that reads the logits from the device after each step and samples on the CPU."""

    lookahead = 0  # because the next step needs the tokens of this one

    def __init__(self, model: Model) -> None:
        self._model = model

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
