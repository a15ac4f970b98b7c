"""A listener that keeps the time of each token.

The clock is the CPU time of this process: with one thread in the model, other programs then hardly change it.
"""

import threading
import time
from collections.abc import Iterable
from itertools import pairwise

from llama2_server.engine.sequence import FinishReason, SequenceResult
from llama2_server.engine.steps.report import StepPhase, StepReport


class TimedReply:
    """Tokens of a reply and their times; `wait` for the first tokens or for the end."""

    def __init__(self) -> None:
        self.started_at = time.process_time()
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self._tokens = threading.Condition()
        self._result: SequenceResult | None = None

    def on_token(self, token_id: int) -> bool:
        """Store a token."""
        with self._tokens:
            self.times.append(time.process_time())
            self.token_ids.append(token_id)
            self._tokens.notify()
        return False

    def on_finish(self, result: SequenceResult) -> None:
        """Store the result."""
        with self._tokens:
            self._result = result
            self._tokens.notify()

    def wait(self, tokens: int | None = None) -> None:
        """Wait for this number of tokens, or for the end."""
        with self._tokens:
            self._tokens.wait_for(lambda: self._result or (tokens is not None and len(self.token_ids) >= tokens))
        if self._result and self._result.reason is FinishReason.FAILED:
            raise SystemExit("the engine failed; the log above has the reason")

    @property
    def first_token_seconds(self) -> float:
        """Time from the submission to the first token."""
        return self.times[0] - self.started_at

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the last one."""
        return self.times[-1] - self.times[0]

    def longest_gap(self, begin: float, end: float) -> float:
        """Return the longest time between two tokens of which the later one is between `begin` and `end`."""
        return max(after - before for before, after in pairwise(self.times) if begin <= after and before <= end)


def steps_of(steps: Iterable[StepReport]) -> tuple[int, int, int]:
    """Return the numbers of decode steps, of checked guesses and of right ones."""
    decoding = [step for step in steps if step.phase is StepPhase.DECODE]
    return len(decoding), sum(step.proposed for step in decoding), sum(step.accepted for step in decoding)
