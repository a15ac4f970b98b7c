"""The engine without the service: token ids in, token ids out."""

import queue
import random
import statistics
import threading
import time
from dataclasses import dataclass

from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, SequenceResult

ROUNDS = 5


class TokenTimes:
    """A listener that records the times of the first token and of the end."""

    def __init__(self) -> None:
        self.first_token_at: float | None = None
        self.finished: queue.Queue[tuple[float, SequenceResult]] = queue.Queue()

    def on_token(self, token_id: int) -> bool:
        """Record the time of the first token."""
        self.first_token_at = self.first_token_at or time.perf_counter()
        return False

    def on_finish(self, result: SequenceResult) -> None:
        """Record the time of the end."""
        self.finished.put((time.perf_counter(), result))


@dataclass(frozen=True)
class EngineSpeed:
    """Medians over the rounds."""

    tokens_per_second: float  # of all rows together, after the first token of each
    first_token_seconds: float
    engine_thread_share: float  # processor time of the engine's thread, as a share of one core


class EngineOnly:
    """An engine under measurement; prompts are random and differ from each other."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._random = random.Random(0)

    def speed(self, prompt_tokens: int, new_tokens: int, rows: int = 1, temperature: float = 0.0) -> EngineSpeed:
        """Measure `rows` equal requests at once; decoding is timed from the last request's first token."""
        params = GenerationParams(new_tokens, temperature=temperature)
        rounds = [self._round(prompt_tokens, params, rows) for _ in range(ROUNDS + 1)][1:]
        return EngineSpeed(*map(statistics.median, zip(*rounds, strict=True)))

    def _round(self, prompt_tokens: int, params: GenerationParams, rows: int) -> tuple[float, float, float]:
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "engine" and thread.ident)
        processor_time = time.pthread_getcpuclockid(thread.ident or 0)
        used, started_at = time.clock_gettime(processor_time), time.perf_counter()
        all_times = [TokenTimes() for _ in range(rows)]
        for times in all_times:
            prompt = self._random.choices(range(3, self._vocab_size), k=prompt_tokens)
            self._engine.submit(prompt, params, times)
        ends = [times.finished.get() for times in all_times]
        if any(result.reason is not FinishReason.MAX_TOKENS for _, result in ends):
            raise SystemExit(f"the engine stopped before max_tokens: {ends}")
        firsts = [times.first_token_at or started_at for times in all_times]
        # From the last first token on, all rows share every step until the first row ends.
        tokens = (params.max_tokens - 1) * rows
        ended_at = max(finished_at for finished_at, _ in ends)
        share = (time.clock_gettime(processor_time) - used) / (time.perf_counter() - started_at)
        return tokens / (ended_at - max(firsts)), firsts[0] - started_at, share
