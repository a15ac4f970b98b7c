"""A step runner that takes virtual time and returns the tokens of a scripted model without computing logits."""

import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

from tests.support.simulated.threads import pause

from llama2_server.engine.sequence import Sequence, TokenOrError
from llama2_server.engine.step_runner import StepKind

STEP_SECONDS = 0.15


class DeviceFault(RuntimeError):
    """An error of the simulated device."""


class ScriptedSteps:
    """Each prompt has its own reply: the script from a place that its last tokens determine.

    The number of tokens of a reply depends only on the prompt, so that the model of the service can predict it.
    """

    kind = StepKind.TORCH
    lookahead = 0

    def __init__(
        self, script: SequenceOf[int], eos_id: int, draw: random.Random, on_fault: Callable[[Exception], None]
    ) -> None:
        self._on_fault = on_fault
        self.kernel_choices: dict[str, str] = {}
        self._script = list(script)
        self._eos_id = eos_id
        self._draw = draw
        self._errors: list[Exception] = []
        self.violations: list[str] = []
        self.broken = False
        """Whether each step fails."""
        self.hang_seconds = 0.0
        """How long a step takes in addition."""

    def fail_next(self, error: Exception) -> None:
        """Let the next token fail."""
        self._errors.append(error)

    def forget(self, error: Exception) -> None:
        """Let no token fail with an error that has not occurred yet."""
        if error in self._errors:
            self._errors.remove(error)

    def prefill(self, sequence: Sequence, chunk: list[int]) -> Iterable[TokenOrError]:
        """Process a chunk of a prompt."""
        self._step()
        if sequence.position + len(chunk) < len(sequence.prompt_ids):
            return ()
        return [self._token(sequence)]

    def decode(self, rows: SequenceOf[Sequence]) -> Iterable[TokenOrError]:
        """Compute the next token of each sequence."""
        if len({row.slot for row in rows}) != len(rows):
            self.violations.append("two sequences share a KV cache slot")
        self._step()
        return [self._token(row) for row in rows]

    def _step(self) -> None:
        seconds = self.hang_seconds
        if seconds:
            self._on_fault(TimeoutError("the step hangs"))
        pause(seconds + STEP_SECONDS * self._draw.uniform(0.5, 1.5))
        if self.broken:
            error = DeviceFault("an illegal memory access was encountered")
            self._on_fault(error)
            raise error

    def _token(self, sequence: Sequence) -> TokenOrError:
        if self._errors:
            self._on_fault(self._errors[-1])
            return self._errors.pop()
        produced = len(sequence.output_ids)
        if produced + 1 == reply_tokens(sequence.prompt_ids):
            return self._eos_id
        return self._script[(sum(sequence.prompt_ids) + produced) % len(self._script)]


def reply_tokens(prompt_ids: SequenceOf[int]) -> int:
    """Return the number of tokens of the whole reply to a prompt, with the end of the sequence; few are long."""
    number = sum(prompt_ids[-12:])
    return 40 if number % 37 == 0 else 1 + number % 9
