"""Compares the bare engine and the whole service with transformers.generate and llama.cpp: same weights, same run.

    python -m benchmarks.compare                       # the demo model, and made ones of 134M and 1.2B parameters
    python -m benchmarks.compare --checkpoint DIR      # a checkpoint of your own

Each round runs every contender once, one after another, so that a machine that slows down slows all of them; the
figures are medians over the rounds, the ratios medians of the rounds' own ratios. All are greedy. The service runs in a
process of its own and is called over gRPC from this one.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import queue
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tools.make_checkpoint import PRESETS, make_checkpoint

from benchmarks import llama_cpp
from llama2_client import Client
from llama2_server.engine.checkpoint import read_config, read_eos_ids
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequences import Finish, FinishReason
from llama2_server.engine.tokenizer import ChatMessage, Tokenizer
from llama2_server.engine.weights import load_model

PROMPT = "Tell me a story about a fox who lives by the sea."


@dataclass(frozen=True)
class Run:
    """One generation: tokens, seconds to the first one, seconds in all."""

    tokens: int
    first_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first, over the time after the first."""
        return (self.tokens - 1) / (self.total_seconds - self.first_seconds)


@dataclass(frozen=True)
class Task:
    """What every contender does."""

    checkpoint: Path
    prompt_ids: list[int]
    max_tokens: int
    dtype: str


Contender = Callable[[], Run]


class _Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when generate's first token comes; generate hands over the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_generate(task: Task) -> Contender:
    """`LlamaForCausalLM.generate` as its documentation shows it."""
    dtype = getattr(torch, task.dtype)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(task.checkpoint, dtype=dtype)
    inputs = torch.tensor([task.prompt_ids])

    def run() -> Run:
        clock, begun = _Clock(), time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=task.max_tokens,
                do_sample=False,
                streamer=clock,
            )
        ended = time.perf_counter()
        return Run(output.shape[1] - inputs.shape[1], clock.times[1] - begun, ended - begun)

    return run


class Times:
    """A listener that keeps the tokens, and notes when the first one and the end came."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.first: float | None = None
        self.ended: queue.Queue[tuple[float, Finish]] = queue.Queue()

    def on_token(self, token_id: int) -> bool:
        """Keep it."""
        self.first = self.first or time.perf_counter()
        self.token_ids.append(token_id)
        return False

    def on_finish(self, finish: Finish) -> None:
        """Note the time."""
        self.ended.put((time.perf_counter(), finish))


def bare_engine(task: Task) -> Contender:
    """Our engine without the service around it: token ids in, token ids out."""
    model = load_model(
        task.checkpoint,
        device="cpu",
        dtype=getattr(torch, task.dtype),
        context_length=len(task.prompt_ids) + task.max_tokens,
        slots=1,
    )
    engine = Engine(model, read_eos_ids(task.checkpoint))

    def run() -> Run:
        times, begun = Times(), time.perf_counter()
        engine.submit(task.prompt_ids, GenerationParams(task.max_tokens, temperature=0), times)
        ended, finish = times.ended.get()
        if finish.reason is FinishReason.FAILED or times.first is None:
            raise SystemExit(f"the engine failed: {finish}")
        return Run(finish.output_tokens, times.first - begun, ended - begun)

    return run


def whole_service(address: str, task: Task) -> Contender:
    """The service over gRPC, streamed, timed by its client."""
    letters = itertools.cycle(string.ascii_uppercase)

    async def stream() -> Run:
        # Another beginning each time: the service would reuse the prefill of a prompt that it knows.
        prompt = f"{next(letters)}. {PROMPT}"
        async with Client(address) as client:
            await client.count_tokens(prompt)  # opens the connection
            begun, first = time.perf_counter(), None
            reply = client.stream(prompt, max_tokens=task.max_tokens, temperature=0, no_cache=True)
            async for _ in reply:
                first = first or time.perf_counter()
            ended = time.perf_counter()
            return Run(reply.reply.output_tokens, (first or ended) - begun, ended - begun)

    return lambda: asyncio.run(stream())


def llama_cpp_f16(task: Task, folder: Path) -> Contender:
    """llama.cpp on float16 weights."""
    peer = llama_cpp.LlamaCpp(task.checkpoint, folder, len(task.prompt_ids) + task.max_tokens)

    def run() -> Run:
        begun = time.perf_counter()
        token_id = peer.begin(task.prompt_ids)
        first = time.perf_counter() - begun
        for _ in range(task.max_tokens - 1):
            token_id = peer.go_on(token_id)
        return Run(task.max_tokens, first, time.perf_counter() - begun)

    return run


@contextlib.contextmanager
def served(task: Task) -> Iterator[str]:
    """A server process on these weights; its address."""
    limits = {"context_length_limit": read_config(task.checkpoint).max_positions, "sequence_length_limit": 2500}
    with tempfile.TemporaryDirectory() as folder:
        card = _card_with(Path(folder) / "card.yaml", limits)
        command = [sys.executable, "-m", "llama2_server", "--listen", "127.0.0.1:0", "--card", str(card)]
        command += ["--weights", str(task.checkpoint), "--dtype", task.dtype]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("SERVING on "):
                raise SystemExit("the server did not start")
            try:
                yield line.split()[2].rstrip(".")
            finally:
                process.terminate()


def _card_with(path: Path, limits: dict[str, int]) -> Path:
    """The 7B card with other token limits, and a quota that no benchmark exceeds."""
    shipped = resources.files("llama2_server") / "cards" / "llama-2-7b-chat-fp16.yaml"
    document = next(yaml.safe_load_all(shipped.read_text(encoding="utf-8")))
    for entry in document["model"]["properties"]:
        entry["value"] = str(limits.get(entry["property_id"], entry["value"])).replace("default: 5", "default: 100000")
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def compare(name: str, checkpoint: Path, *, max_tokens: int, dtype: str, rounds: int) -> None:
    """Run the rounds and print one table."""
    prompt_ids = Tokenizer(checkpoint / "tokenizer.model").encode_chat([ChatMessage("user", PROMPT)])
    task = Task(checkpoint, prompt_ids, max_tokens, dtype)
    with served(task) as address, tempfile.TemporaryDirectory() as folder:
        contenders = {
            "transformers.generate": transformers_generate(task),
            "engine": bare_engine(task),
            "service, over gRPC": whole_service(address, task),
        }
        if llama_cpp.installed() and dtype == "float16":
            contenders["llama.cpp F16"] = llama_cpp_f16(task, Path(folder))
        for run in contenders.values():
            run()  # warm up
        results = [{label: run() for label, run in contenders.items()} for _ in range(rounds)]
    if "llama.cpp F16" not in contenders:
        print("\nNot run: llama.cpp (see benchmarks/llama_cpp.py)")
    print(f"\n{name}, {dtype}: {len(prompt_ids)} prompt tokens, {rounds} rounds\n")
    print("| | tokens | tokens/s | x transformers | x engine | time to first token |")
    print("|---|---|---|---|---|---|")
    for label in contenders:
        runs = [result[label] for result in results]
        speed = statistics.median(run.tokens_per_second for run in runs)
        first = statistics.median(run.first_seconds for run in runs) * 1000
        versus = [_ratio(results, label, peer) for peer in ("transformers.generate", "engine")]
        print(f"| {label} | {runs[0].tokens} | {speed:.1f} | {versus[0]:.2f} | {versus[1]:.2f} | {first:.1f} ms |")


def _ratio(results: list[dict[str, Run]], label: str, peer: str) -> float:
    return statistics.median(result[label].tokens_per_second / result[peer].tokens_per_second for result in results)


def main() -> None:
    """Parse the flags and run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint directory instead of the demo and the 134M one")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "grpcio"))
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, {versions}, no GPU used")
    options = {"max_tokens": arguments.max_tokens, "dtype": arguments.dtype, "rounds": arguments.rounds}
    if arguments.checkpoint:
        compare(str(arguments.checkpoint), arguments.checkpoint, **options)
        return
    compare("The demo model", Path(str(resources.files("llama2_server") / "demo")), **options)
    with tempfile.TemporaryDirectory() as folder:
        for preset in ("134m", "1.2b"):
            made = make_checkpoint(Path(folder) / preset, PRESETS[preset])
            compare(f"{preset.upper()} parameters, random weights", made, **options)


if __name__ == "__main__":
    main()
