"""The service over gRPC, measured by a client in this process; the server runs in another process."""

import asyncio
import contextlib
import itertools
import os
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import yaml

from llama2_client import Client

ROUNDS = 5
LOAD_SECONDS = "benchmark-load-seconds"
"""A file that the server writes to its data directory: the time in which the weights were created."""
ENGINE_THREAD = "benchmark-engine-thread"
"""Such a file with Linux's number of the engine's thread."""
CANCELS = 200
PROMPT_TOKENS = 128
WORDS = "The gRPC service answers each call in its own time, and a llama walks slowly over the hills of the Andes. "


@dataclass(frozen=True)
class ServiceSpeed:
    """Medians over the rounds; for cancellations, the 99th percentile."""

    input_tokens: int
    tokens_per_second: float
    first_token_seconds: float
    engine_thread_share: float
    """Processor time of the engine's thread while it streams, as a share of one core."""
    slot_release_seconds: float
    """From a cancellation to the next request's first token, minus the time to first token of an idle service."""


@dataclass(frozen=True)
class Server:
    """A running server process."""

    address: str
    process_id: int
    data_directory: Path

    def engine_seconds(self) -> float:
        """Return the processor time that the engine's thread has used."""
        thread = (self.data_directory / ENGINE_THREAD).read_text(encoding="ascii")
        stat = Path(f"/proc/{self.process_id}/task/{thread}/stat").read_text(encoding="utf-8")
        fields = stat.rpartition(")")[2].split()  # proc(5): the name in parentheses can contain spaces
        user, system = fields[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(shape: str, device: str, *, new_tokens: int) -> Iterator[dict[str, float]]:
    """Yield the first start, the second start, and the speed of the service.

    A start has the seconds to SERVING, and the seconds that created the weights, in place of a load.
    """
    with tempfile.TemporaryDirectory() as folder:
        data_directory = Path(folder)
        started_at = time.perf_counter()
        with running_server(shape, device, data_directory):
            yield _start("first", started_at, data_directory)
        started_at = time.perf_counter()
        with running_server(shape, device, data_directory) as server:
            yield _start("second", started_at, data_directory)
            yield asdict(asyncio.run(_measure(server, new_tokens)))


def _start(name: str, started_at: float, data_directory: Path) -> dict[str, float]:
    seconds = time.perf_counter() - started_at
    loading = float((data_directory / LOAD_SECONDS).read_text(encoding="ascii"))
    return {f"{name}_start_seconds": seconds, f"{name}_load_seconds": loading}


@contextlib.contextmanager
def running_server(shape: str, device: str, data_directory: Path) -> Iterator[Server]:
    """Run a server process."""
    with tempfile.TemporaryDirectory() as folder:
        card = _card(Path(folder) / "card.yaml")
        command = [sys.executable, "-m", "benchmarks.gpu.measurement.server", shape, device, "--listen", "127.0.0.1:0"]
        # Any card accepts these weights; the server creates random ones in their place.
        command += ["--card", str(card), "--data-directory", str(data_directory), "--weights", "demo"]
        command += ["--log-level", "warning"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("SERVING on "):
                raise SystemExit("the server did not start; see its messages above")
            try:
                yield Server(line.split()[2].rstrip("."), process.pid, data_directory)
            finally:
                process.terminate()
                process.communicate()  # drain the output that follows the first line


def _card(path: Path) -> Path:
    """Write the 7B card with a quota that no benchmark exceeds."""
    shipped = resources.files("llama2_server") / "cards" / "llama-2-7b-chat-fp16.yaml"
    document = next(yaml.safe_load_all(shipped.read_text(encoding="utf-8")))
    for entry in document["model"]["properties"]:
        entry["value"] = str(entry["value"]).replace("default: 5", "default: 1000000")
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


async def _measure(server: Server, new_tokens: int) -> ServiceSpeed:
    async with Client(server.address, resume=False) as client:
        text = await _prompt_of(client, PROMPT_TOKENS)
        # Each prompt begins differently, because the service would reuse the prefill of an equal prefix.
        prompts = (f"{first}{second} {text}" for first, second in itertools.permutations(string.ascii_letters, 2))
        await _stream(client, next(prompts), new_tokens)
        used, started_at = server.engine_seconds(), time.perf_counter()
        rounds = [await _stream(client, next(prompts), new_tokens) for _ in range(ROUNDS)]
        share = (server.engine_seconds() - used) / (time.perf_counter() - started_at)
        input_tokens, rates, first_tokens = zip(*rounds, strict=True)
        idle = statistics.median([(await _stream(client, next(prompts), 1))[2] for _ in range(ROUNDS)])
        waits = sorted([await _cancel_and_retry(client, next(prompts), next(prompts)) - idle for _ in range(CANCELS)])
    median = statistics.median
    return ServiceSpeed(input_tokens[0], median(rates), median(first_tokens), share, waits[int(0.99 * CANCELS)])


async def _prompt_of(client: Client, tokens: int) -> str:
    """Return the longest text of at most `tokens` tokens, including the chat template and a beginning."""
    words = (WORDS * 20).split()
    count = len(words)
    while (await client.count_tokens("AB " + " ".join(words[:count]))).input_tokens > tokens:
        count -= 1
    return " ".join(words[:count])


async def _stream(client: Client, prompt: str, new_tokens: int) -> tuple[int, float, float]:
    """Return input tokens, tokens per second after the first token, and seconds to the first token."""
    started_at, first = time.perf_counter(), None
    stream = client.stream(prompt, max_tokens=new_tokens, temperature=0, no_cache=True)
    async for _ in stream:
        first = first or time.perf_counter()
    finished_at, reply = time.perf_counter(), stream.reply
    first = first or finished_at
    return reply.input_tokens, (reply.output_tokens - 1) / max(finished_at - first, 1e-9), first - started_at


async def _cancel_and_retry(client: Client, prompt: str, next_prompt: str) -> float:
    """Return the seconds from a cancellation during a reply to the first token of the next reply."""
    async with client.stream(prompt, max_tokens=200, temperature=0, no_cache=True) as stream:
        async for _ in stream:
            break
        started_at = time.perf_counter()
    waited = time.perf_counter() - started_at
    return waited + (await _stream(client, next_prompt, 1))[2]
