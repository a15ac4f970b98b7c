"""The service over gRPC, timed by a client in another process: this one."""

import asyncio
import contextlib
import itertools
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from llama2_client import Client

ROUNDS = 5
HANG_UPS = 200
PROMPT_TOKENS = 128
WORDS = "The gRPC service answers each call in its own time, and a llama walks slowly over the hills of the Andes. "


@dataclass(frozen=True)
class ServiceSpeed:
    """Medians over the rounds, and for the hang-ups the 99th percentile."""

    input_tokens: int
    tokens_per_second: float
    first_token_seconds: float
    free_again_seconds: float
    """From a cancel to the next caller's first token, less the time that an idle service takes for one."""


def measure(shape: str, device: str, *, new_tokens: int) -> tuple[ServiceSpeed, float, float]:
    """Its speed, and the seconds from the process's first start to SERVING and from its second start."""
    with tempfile.TemporaryDirectory() as data_directory:
        begun = time.perf_counter()
        with served(shape, device, Path(data_directory)) as address:
            first = time.perf_counter() - begun
            speed = asyncio.run(_call(address, new_tokens))
        begun = time.perf_counter()
        with served(shape, device, Path(data_directory)):
            return speed, first, time.perf_counter() - begun


@contextlib.contextmanager
def served(shape: str, device: str, data_directory: Path) -> Iterator[str]:
    """A server process; its address."""
    with tempfile.TemporaryDirectory() as folder:
        card = _card(Path(folder) / "card.yaml")
        command = [sys.executable, "-m", "benchmarks.gpu.measurement.server", shape, device, "--listen", "127.0.0.1:0"]
        # The card wants weights; the server makes them.
        command += ["--card", str(card), "--data-directory", str(data_directory), "--weights", folder]
        command += ["--log-level", "warning"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("SERVING on "):
                raise SystemExit("the server did not start")
            try:
                yield line.split()[2].rstrip(".")
            finally:
                process.terminate()
                process.communicate()  # it may still be saying how to call it


def _card(path: Path) -> Path:
    """The 7B card with a quota that no benchmark exceeds."""
    shipped = resources.files("llama2_server") / "cards" / "llama-2-7b-chat-fp16.yaml"
    document = next(yaml.safe_load_all(shipped.read_text(encoding="utf-8")))
    for entry in document["model"]["properties"]:
        entry["value"] = str(entry["value"]).replace("default: 5", "default: 1000000")
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


async def _call(address: str, new_tokens: int) -> ServiceSpeed:
    async with Client(address) as client:
        text = await _text_of(client, PROMPT_TOKENS)
        # Another beginning each time: the service would reuse the prefill of a prompt that it knows.
        prompts = (f"{first}{second} {text}" for first, second in itertools.permutations(string.ascii_letters, 2))
        rounds = [await _stream(client, next(prompts), new_tokens) for _ in range(ROUNDS + 1)][1:]
        inputs, rates, firsts = zip(*rounds, strict=True)
        idle = statistics.median([(await _stream(client, next(prompts), 1))[2] for _ in range(ROUNDS)])
        waits = sorted([await _hang_up(client, next(prompts), next(prompts)) - idle for _ in range(HANG_UPS)])
    median = statistics.median
    return ServiceSpeed(inputs[0], median(rates), median(firsts), waits[int(0.99 * HANG_UPS)])


async def _text_of(client: Client, tokens: int) -> str:
    """The longest text that makes no more than so many tokens together with the template and a beginning."""
    words = (WORDS * 20).split()
    count = len(words)
    while (await client.count_tokens("AB " + " ".join(words[:count]))).input_tokens > tokens:
        count -= 1
    return " ".join(words[:count])


async def _stream(client: Client, prompt: str, new_tokens: int) -> tuple[int, float, float]:
    """Input tokens, tokens a second after the first, seconds to the first."""
    begun, first = time.perf_counter(), None
    stream = client.stream(prompt, max_tokens=new_tokens, temperature=0, no_cache=True)
    async for _ in stream:
        first = first or time.perf_counter()
    ended, reply = time.perf_counter(), stream.reply
    first = first or ended
    return reply.input_tokens, (reply.output_tokens - 1) / max(ended - first, 1e-9), first - begun


async def _hang_up(client: Client, prompt: str, next_prompt: str) -> float:
    """Seconds from a cancel in the middle of a reply to the first token of the next one."""
    async with client.stream(prompt, max_tokens=200, temperature=0, no_cache=True) as stream:
        async for _ in stream:
            break
        begun = time.perf_counter()
    waited = time.perf_counter() - begun
    return waited + (await _stream(client, next_prompt, 1))[2]
