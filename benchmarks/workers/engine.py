"""Our engine without the service; it takes and returns token ids."""

import queue
import time
from pathlib import Path

import torch

from benchmarks.workers.protocol import TEMPERATURE, TOP_P, Generated, Setup, serve
from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.native.library import NativeUnavailable, read_bandwidth, use_huge_pages
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, SequenceResult
from llama2_server.engine.step_planner import StepPolicy
from llama2_server.engine.steps.report import StepPhase, StepReport

BANDWIDTH_BYTES = 2**30  # far beyond any cache
BANDWIDTH_READS = 5


class TimingListener:
    """A sequence listener that stores the tokens and the times of the first token and the end."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.first_token_at = 0.0
        self.finished: queue.Queue[tuple[float, SequenceResult]] = queue.Queue()

    def on_token(self, token_id: int) -> bool:
        """Store the token, and the time if it is the first."""
        self.first_token_at = self.first_token_at or time.perf_counter()
        self.token_ids.append(token_id)
        return False

    def on_finish(self, result: SequenceResult) -> None:
        """Store the result and the time."""
        self.finished.put((time.perf_counter(), result))


class EngineOnly:
    """Our engine, and a measurement of the memory bandwidth."""

    packages = ("torch",)

    def __init__(self, setup: Setup) -> None:
        self._threads = setup.threads
        model = load_model(
            Path(setup.checkpoint),
            device="cpu",
            dtype=torch.float16,
            context_length=setup.context_length,
            slots=setup.slots,
        )
        self._steps: list[StepReport] = []
        # In the other benchmarks guesses would only measure how often random weights repeat themselves.
        policy = StepPolicy(prompt_lookup=setup.prompt_lookup)
        self._engine = Engine(model, frozenset(), on_step=self._steps.append, step_policy=policy)
        self._memory = torch.empty(BANDWIDTH_BYTES, dtype=torch.uint8)
        use_huge_pages(self._memory)
        self._memory.zero_()
        self.arithmetic = "float16 weights (12 bits if lossless), float32"

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Continue all prompts at once, one slot per prompt."""
        self._steps.clear()
        started_at = time.perf_counter()
        listeners = [TimingListener() for _ in prompts]
        for index, (prompt_ids, listener) in enumerate(zip(prompts, listeners, strict=True)):
            self._engine.submit(prompt_ids, _params(tokens, None if seed is None else seed + index), listener)
        ends = [listener.finished.get() for listener in listeners]
        if any(result.reason is FinishReason.FAILED for _, result in ends):
            raise SystemExit("the engine failed; the log above has the reason")
        first_token_at = max(listener.first_token_at for listener in listeners)
        finished_at = max(at for at, _ in ends)
        token_ids = [listener.token_ids for listener in listeners]
        steps = sum(step.phase is StepPhase.DECODE for step in list(self._steps))
        return Generated(token_ids, first_token_at - started_at, finished_at - started_at, steps)

    def read_bandwidth(self) -> float | None:
        """Return the memory bandwidth of all threads in bytes per second, a median; None without native code."""
        try:
            reads = sorted(read_bandwidth(self._memory, self._threads) for _ in range(BANDWIDTH_READS))
        except NativeUnavailable:
            return None
        return reads[len(reads) // 2]


def _params(tokens: int, seed: int | None) -> GenerationParams:
    if seed is None:
        return GenerationParams(tokens, temperature=0)
    return GenerationParams(tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=seed)


if __name__ == "__main__":
    serve(EngineOnly)
