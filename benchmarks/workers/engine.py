"""Our engine without the service around it: token ids in, token ids out."""

import queue
import time
from pathlib import Path

import torch

from benchmarks.workers.protocol import Generated, Setup, serve
from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.native.library import NativeUnavailable, read_bandwidth, use_huge_pages
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, SequenceResult

BANDWIDTH_BYTES = 2**30  # far beyond any cache
BANDWIDTH_READS = 5


class Times:
    """A listener that keeps the tokens, and tells when the first one and the end came."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.first = 0.0
        self.ended: queue.Queue[tuple[float, SequenceResult]] = queue.Queue()

    def on_token(self, token_id: int) -> bool:
        """Keep it."""
        self.first = self.first or time.perf_counter()
        self.token_ids.append(token_id)
        return False

    def on_finish(self, finish: SequenceResult) -> None:
        """Note the time."""
        self.ended.put((time.perf_counter(), finish))


class BareEngine:
    """The engine, and the memory's own speed beside it."""

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
        self._engine = Engine(model, frozenset())
        self._memory = torch.empty(BANDWIDTH_BYTES, dtype=torch.uint8)
        use_huge_pages(self._memory)
        self._memory.zero_()
        self.arithmetic = "float16 weights, float32"

    def generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        """All prompts at once; a slot for each."""
        begun = time.perf_counter()
        listeners = [Times() for _ in prompts]
        for prompt_ids, listener in zip(prompts, listeners, strict=True):
            self._engine.submit(prompt_ids, GenerationParams(tokens, temperature=0), listener)
        ends = [listener.ended.get() for listener in listeners]
        if any(finish.reason is FinishReason.FAILED for _, finish in ends):
            raise SystemExit("the engine failed; the log above says why")
        first = max(listener.first for listener in listeners)
        ended = max(at for at, _ in ends)
        return Generated([listener.token_ids for listener in listeners], first - begun, ended - begun)

    def read_bandwidth(self) -> float | None:
        """Bytes a second at which as many threads read memory; the median of some reads. None without native code."""
        try:
            reads = sorted(read_bandwidth(self._memory, self._threads) for _ in range(BANDWIDTH_READS))
        except NativeUnavailable:
            return None
        return reads[len(reads) // 2]


if __name__ == "__main__":
    serve(BareEngine)
