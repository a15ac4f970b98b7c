"""How the engine has a model compute a step: here with the tokens sampled on the host, one row after another.

`cuda/steps.py` does both on the device.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from torch import Tensor

from llama2_server.engine.model.llama import Model
from llama2_server.engine.sampling import Sampler
from llama2_server.engine.sequence import Sequence

TokenOrError = int | Exception
"""A row's next token, or what kept it from having one."""


class StepRunner(Protocol):
    """A model and the sampling of its tokens."""

    @property
    def lookahead(self) -> int:
        """How many steps may be under way while the tokens of the one before are being read."""

    def prefill(self, sequence: Sequence, chunk: list[int]) -> Iterable[TokenOrError]:
        """Begin to append a part of its prompt; after the last part one token follows, to be read once.

        The first reading waits for the device. Raises where nothing was begun.
        """

    def decode(self, rows: SequenceOf[Sequence]) -> Iterable[TokenOrError]:
        """Begin to append each row's last token; one token for each row follows, to be read once, as above."""


class HostStepRunner:
    """Steps whose tokens are sampled on the host."""

    lookahead = 0  # the next step's input is known only when this one's tokens are

    def __init__(self, model: Model) -> None:
        self._model = model

    def prefill(self, sequence: Sequence, chunk: list[int]) -> Iterable[TokenOrError]:
        """As in Steps."""
        logits = self._model.prefill(sequence.slot, chunk, sequence.position)  # (vocab_size,)
        if sequence.position + len(chunk) < len(sequence.prompt_ids):
            return ()
        return self._sample([sequence], [logits])

    def decode(self, rows: SequenceOf[Sequence]) -> Iterable[TokenOrError]:
        """As in Steps."""
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
