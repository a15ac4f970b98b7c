"""A profile of one decode step: the time of each kernel and of the gaps between kernels."""

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
class KernelTime:
    """The runs of one kernel in a step and their total time."""

    name: str
    runs: float
    seconds: float


class _DiscardingListener:
    def on_token(self, token_id: int) -> bool:
        return False

    def on_finish(self, result: SequenceResult) -> None:
        pass


def profile_step(step_runner: CudaStepRunner, prompt_ids: list[int]) -> tuple[float, list[KernelTime]]:
    """Return the seconds per step, gaps between kernels included, and the kernels sorted by descending time."""
    sequence = Sequence(prompt_ids, GenerationParams(4 * STEPS, temperature=0), _DiscardingListener(), slot=0)
    list(step_runner.prefill(sequence, prompt_ids))
    sequence.position = len(prompt_ids)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            for _ in step_runner.decode([sequence]):
                pass
            sequence.position += 1
        torch.cuda.synchronize()
    events: list[Any] = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    start = min(event.time_range.start for event in events)
    end = max(event.time_range.end for event in events)
    runs: Counter[str] = Counter(event.name for event in events)
    micros: Counter[str] = Counter()
    for event in events:
        micros[event.name] += event.time_range.elapsed_us()
    kernel_times = [KernelTime(name, runs[name] / STEPS, spent / 1e6 / STEPS) for name, spent in micros.most_common()]
    return (end - start) / 1e6 / STEPS, kernel_times
