"""The engine without the service around it: token ids in, token ids out."""

import queue
import random
import statistics
import time
from dataclasses import dataclass

from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, SequenceResult

ROUNDS = 5


class Times:
    """A listener that notes when the first token and the end came."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.ended: queue.Queue[tuple[float, SequenceResult]] = queue.Queue()

    def on_token(self, token_id: int) -> bool:
        """Note the first one."""
        self.first = self.first or time.perf_counter()
        return False

    def on_finish(self, finish: SequenceResult) -> None:
        """Note the time."""
        self.ended.put((time.perf_counter(), finish))


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds."""

    tokens_per_second: float  # of all rows together, after each one's first token
    first_token_seconds: float


class BareEngine:
    """An engine that is measured; prompts mean nothing, and no two are alike."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._chance = random.Random(0)

    def speed(self, prompt_tokens: int, new_tokens: int, rows: int = 1, temperature: float = 0.0) -> Speed:
        """So many equal requests at once. Decoding is timed from when the last of them has its first token."""
        params = GenerationParams(new_tokens, temperature=temperature)
        rounds = [self._round(prompt_tokens, params, rows) for _ in range(ROUNDS + 1)][1:]
        rates, firsts = zip(*rounds, strict=True)
        return Speed(statistics.median(rates), statistics.median(firsts))

    def _round(self, prompt_tokens: int, params: GenerationParams, rows: int) -> tuple[float, float]:
        begun = time.perf_counter()
        all_times = [Times() for _ in range(rows)]
        for times in all_times:
            prompt = self._chance.choices(range(3, self._vocab_size), k=prompt_tokens)
            self._engine.submit(prompt, params, times)
        ends = [times.ended.get() for times in all_times]
        if any(finish.reason is not FinishReason.MAX_TOKENS for _, finish in ends):
            raise SystemExit(f"the engine did not finish: {ends}")
        firsts = [times.first or begun for times in all_times]
        # From here on all rows share every step, until the first of them ends.
        tokens = (params.max_tokens - 1) * rows
        return tokens / (max(ended for ended, _ in ends) - max(firsts)), firsts[0] - begun
