"""Compare the default request (temperature 0.6, top_p 0.9) with a greedy one, and time native sampling.

    python -m benchmarks.measurement.default_request                      # the demo model, under two minutes
    python -m benchmarks.measurement.default_request --checkpoint DIR

Each round runs both requests one after another. It prints medians of the ratios within a round, on an otherwise idle
machine and next to one busy process per core. The sampling times are CPU times of one thread.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.engines.service import TIMEOUT_SECONDS, Service
from benchmarks.workers.engine import TimingListener
from llama2_client import Client
from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_sampler import NativeSampler
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.step_planner import StepPolicy
from llama2_server.engine.step_runner import HostStepRunner, StepRunner, host_step_runner
from llama2_server.engine.text.tokenizer import Tokenizer

DEFAULT = GenerationParams(max_tokens=1)
GREEDY = replace(DEFAULT, temperature=0.0)
VOCAB_SIZE = 32_000
SAMPLED_ROWS = 50
SAMPLING_REPEATS = 12
CONTEXT_LENGTH = 1024
TOKENS = 256
PROMPT = "[INST] Tell me a story about a fox in a forest. [/INST]"

SecondsPerToken = Callable[[GenerationParams], float]


def sampling_cases(generator: torch.Generator) -> Iterator[tuple[str, Tensor, GenerationParams]]:
    """Yield a name, logits (SAMPLED_ROWS, VOCAB_SIZE) and parameters for each sampling time."""

    def normal(deviation: float) -> Tensor:
        return torch.randn(SAMPLED_ROWS, VOCAB_SIZE, generator=generator) * deviation

    yield "greedy", normal(4), GREEDY
    yield "default, logits with a standard deviation of 4", normal(4), DEFAULT
    yield "temperature 0.9, the same", normal(4), replace(DEFAULT, temperature=0.9)
    yield "temperature 1.0, the same", normal(4), replace(DEFAULT, temperature=1.0)
    yield "top_p 1, the same", normal(4), replace(DEFAULT, top_p=1.0)
    yield "top_k 40, the same", normal(4), replace(DEFAULT, top_k=40)
    yield "default, flat logits", normal(0.5), DEFAULT
    yield "top_k 31,000 and top_p 0.99, flat logits", normal(0.5), replace(DEFAULT, top_k=31_000, top_p=0.99)
    penalties = replace(DEFAULT, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3)
    yield "all parameters, 3,000 seen tokens, flat logits", normal(0.5), replace(penalties, top_k=31_900, top_p=0.999)
    yield "default, equal logits", normal(0), DEFAULT


def nucleus_sizes(logits: Tensor, params: GenerationParams) -> Tensor:  # (rows, vocab_size) -> (rows,)
    """Return the number of tokens in the nucleus of each row, without the other filters."""
    weights = ((logits.double() - logits.amax(1, keepdim=True)) / params.temperature).exp()
    sums = weights.sort(dim=1, descending=True).values.cumsum(1)
    return (sums < params.top_p * sums[:, -1:]).sum(1) + 1


def report_sampling() -> None:
    """Print the time of one sampled token for each case and instruction set."""
    cases = list(sampling_cases(torch.Generator().manual_seed(0)))
    print(f"\nsampling, {VOCAB_SIZE:,} tokens, microseconds of CPU time: lowest and median of {SAMPLING_REPEATS}")
    for name, logits, params in cases:
        nucleus = ""
        if params.temperature > 0 and params.top_p < 1 and not params.top_k:
            sizes = nucleus_sizes(logits, params)
            nucleus = f"nucleus {int(sizes.min())} to {int(sizes.max())}, median {int(sizes.median())}"
        times = sorted(sampling_seconds(logits, params) for _ in range(SAMPLING_REPEATS))
        print(f"{name:50} {times[0] * 1e6:6.1f} {statistics.median(times) * 1e6:6.1f}   {nucleus}")


def sampling_seconds(logits: Tensor, params: GenerationParams) -> float:  # (rows, vocab_size)
    """Return the CPU seconds per row of native sampling."""
    seen = range(0, VOCAB_SIZE, VOCAB_SIZE // 3_000)
    sampler = NativeSampler(params, list(seen), VOCAB_SIZE)
    started_at = time.thread_time()
    sampler.sample(logits)
    return (time.thread_time() - started_at) / logits.shape[0]


def engine_seconds(engine: Engine, prompt_ids: list[int], params: GenerationParams) -> float:
    """Return the seconds per decoded token of one reply."""
    listener = TimingListener()
    engine.submit(prompt_ids, replace(params, max_tokens=TOKENS), listener)
    finished_at, _ = listener.finished.get()
    return (finished_at - listener.first_token_at) / (TOKENS - 1)


async def service_seconds(address: str, params: GenerationParams) -> float:
    """Return the seconds per decoded token of one streamed reply."""
    async with Client(address, timeout=TIMEOUT_SECONDS, resume=False) as client:
        await client.health()
        # The default request leaves the parameters to the card.
        temperature = 0.0 if params.temperature == 0 else None
        stream = client.stream(
            PROMPT, raw=True, max_tokens=TOKENS, temperature=temperature, seed=params.seed, no_cache=True
        )
        first_at = 0.0
        async for _ in stream:
            first_at = first_at or time.perf_counter()
        return (time.perf_counter() - first_at) / max(stream.reply.output_tokens - 1, 1)


@contextmanager
def busy_cores() -> Iterator[None]:
    """Run one busy process per core."""
    processes = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(_cores())]
    for process in processes:
        process.start()
    try:
        time.sleep(1)  # until all have started
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def report_ratios(name: str, seconds_per_token: SecondsPerToken, rounds: int) -> None:
    """Print the speed of the default request relative to a greedy one."""
    seeds = random.Random(0)
    measured = []
    for _ in range(rounds):
        seed = seeds.getrandbits(64)
        measured.append([seconds_per_token(replace(params, seed=seed)) for params in (DEFAULT, GREEDY)])
    default, greedy = (statistics.median(times) * 1e6 for times in zip(*measured, strict=True))
    ratio = statistics.median(second / first for first, second in measured)
    print(f"{name:50} {ratio:.2f}   {default:7.0f} {greedy:7.0f}")


def report_requests(checkpoint: Path, rounds: int) -> None:
    """Print the ratios of the engine, of the engine with the reference sampler, and of the service."""
    prompt_ids = Tokenizer(checkpoint / "tokenizer.model").encode_raw(PROMPT)
    print(f"\nspeed of the default request / greedy, then microseconds per token of both; {rounds} rounds")
    policy = StepPolicy(prompt_lookup=False)
    runners: dict[str, Callable[[LlamaModel], StepRunner]] = {
        "engine": host_step_runner,
        "engine, sampling in torch (the reference)": HostStepRunner,
    }
    for name, step_runner in runners.items():
        model = load_model(checkpoint, device="cpu", dtype=torch.float16, context_length=CONTEXT_LENGTH, slots=1)
        engine = Engine(model, frozenset(), step_runner=step_runner(model), step_policy=policy)

        def in_engine(params: GenerationParams, engine: Engine = engine) -> float:
            return engine_seconds(engine, prompt_ids, params)

        report_quiet_and_busy(name, in_engine, rounds)
        engine.close()
    with closing(Service(checkpoint, context_length=CONTEXT_LENGTH, slots=1)) as service:

        def in_service(params: GenerationParams) -> float:
            return asyncio.run(service_seconds(service.address, params))

        report_quiet_and_busy("service", in_service, rounds)


def report_quiet_and_busy(name: str, seconds_per_token: SecondsPerToken, rounds: int) -> None:
    """Print the ratio on an otherwise idle machine and next to one busy process per core."""
    seconds_per_token(DEFAULT)  # warm up
    report_ratios(f"{name}, quiet", seconds_per_token, rounds)
    with busy_cores():
        report_ratios(f"{name}, all cores busy", seconds_per_token, rounds)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _spin() -> None:
    while True:
        pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path(str(resources.files("llama2_server") / "demo"))
    parser.add_argument("--checkpoint", type=Path, default=demo, help="directory of a checkpoint; the demo model")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of requests per line")
    arguments = parser.parse_args()
    print(f"{_cores()} cores, torch {torch.__version__}")
    report_sampling()
    report_requests(arguments.checkpoint, arguments.rounds)


if __name__ == "__main__":
    main()
