"""Where the time of one decode step goes: each kernel's share, and the gaps between them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llama2_server.engine.cuda.step_runner import CudaStepRunner
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import Sequence, SequenceResult

STEPS = 8


@dataclass(frozen=True)
class Share:
    """All runs of one kernel in a step."""

    name: str
    runs: float
    seconds: float


class _Nobody:
    def on_token(self, token_id: int) -> bool:
        return False

    def on_finish(self, finish: SequenceResult) -> None:
        pass


def step_profile(step_runner: CudaStepRunner, prompt_ids: list[int]) -> tuple[float, list[Share]]:
    """Seconds of a step from its first kernel to the next step's first, and its kernels, the longest first."""
    sequence = Sequence(prompt_ids, GenerationParams(4 * STEPS, temperature=0), _Nobody(), slot=0)
    list(step_runner.prefill(sequence, prompt_ids))
    sequence.position = len(prompt_ids)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            for _ in step_runner.decode([sequence]):
                pass
            sequence.position += 1
        torch.cuda.synchronize()
    events: list[Any] = [event for event in found.events() if event.device_type.name == "CUDA"]
    begun = min(event.time_range.start for event in events)
    ended = max(event.time_range.end for event in events)
    runs: Counter[str] = Counter(event.name for event in events)
    micros: Counter[str] = Counter()
    for event in events:
        micros[event.name] += event.time_range.elapsed_us()
    shares = [Share(name, runs[name] / STEPS, spent / 1e6 / STEPS) for name, spent in micros.most_common()]
    return (ended - begun) / 1e6 / STEPS, shares
