"""Our complete service as an engine under test: a server process, called over gRPC from this process."""

import asyncio
import string
import subprocess
import sys
import tempfile
import time
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml

from benchmarks.engines.under_test import SkippedPeer, TimedRun
from benchmarks.prompts import Prompt
from llama2_client import Client, Message, ReplyStream
from llama2_server.engine.checkpoint.files import read_config

TIMEOUT_SECONDS = 3600.0
MAX_REUSED_TOKENS = 8  # tokens that random prompts share by chance


class Service:
    """A server for a checkpoint, under the 7B card with other limits; `address` is its gRPC address.

    Files that survive a restart are in `data_directory`, by default in a directory that `close` deletes.
    """

    def __init__(
        self, checkpoint: Path, *, context_length: int, slots: int, data_directory: Path | None = None
    ) -> None:
        """Start the server and wait until it serves; `start_seconds` is the time from exec to SERVING."""
        self._slots = slots
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        card = _write_card(folder / "card.yaml", checkpoint, context_length, slots)
        command = [sys.executable, "-m", "llama2_server", "--listen", "127.0.0.1:0", "--card", str(card)]
        command += ["--weights", str(checkpoint), "--data-directory", str(data_directory or folder / "data")]
        command += ["--no-prompt-lookup"]  # as in workers/engine.py
        started_at = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        self.start_seconds = time.perf_counter() - started_at
        if not line.startswith("SERVING on "):
            self.close()
            raise SkippedPeer("the server did not start")
        self.address = line.split()[2].rstrip(".")

    @property
    def process_id(self) -> int:
        """The id of the server process."""
        return self._process.pid

    def describe(self) -> dict[str, Any]:
        """Return the arithmetic of the engine and the versions of torch and grpcio."""
        packages = ("torch", "grpcio")
        versions = {package: metadata.version(package) for package in packages}
        return {"arithmetic": "float16 weights (12 bits if lossless), float32", "versions": versions}

    def generate(self, prompts: list[Prompt], tokens: int, seed: int | None) -> TimedRun:
        """Stream all replies at once over one connection that is already open.

        With a seed the requests have the card's sampling, and otherwise temperature 0.
        """
        return asyncio.run(self._generate(prompts, tokens, seed))

    def first_token_seconds(self, messages: list[Message], tokens: int = 2) -> float:
        """Return the time to the first token of the next reply of a chat."""

        async def measure() -> float:
            async with Client(self.address, timeout=TIMEOUT_SECONDS, resume=False) as client:
                await client.health()
                started_at = time.perf_counter()
                stream = client.stream(messages=messages, max_tokens=tokens, temperature=0, no_cache=True)
                seconds, _ = await _read(stream, started_at)
                return seconds

        return asyncio.run(measure())

    def close(self) -> None:
        """Stop the server process."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._folder.cleanup()

    async def _generate(self, prompts: list[Prompt], tokens: int, seed: int | None) -> TimedRun:
        def sampling(index: int) -> dict[str, Any]:
            return {"temperature": 0} if seed is None else {"seed": seed + index}

        async with Client(self.address, timeout=TIMEOUT_SECONDS, resume=False) as client:
            await self._overwrite_prefix_cache(client)
            started_at = time.perf_counter()
            streams = [
                client.stream(prompt.text, raw=True, max_tokens=tokens, no_cache=True, **sampling(index))
                for index, prompt in enumerate(prompts)
            ]
            firsts, texts = zip(*await asyncio.gather(*(_read(stream, started_at) for stream in streams)), strict=True)
            total_seconds = time.perf_counter() - started_at
        replies = [stream.reply for stream in streams]
        if any(reply.reused_input_tokens > MAX_REUSED_TOKENS for reply in replies):
            raise RuntimeError("the service reused the prefix of a prompt that must be new to it")
        return TimedRun(sum(reply.output_tokens for reply in replies), max(firsts), total_seconds, texts=list(texts))

    async def _overwrite_prefix_cache(self, client: Client) -> None:
        """Fill every slot with another prompt; otherwise a repeated measurement would reuse its own prompt."""
        letters = string.ascii_letters[: self._slots]
        await asyncio.gather(
            *(client.generate(letter * 16, raw=True, max_tokens=1, no_cache=True) for letter in letters)
        )


async def _read(stream: ReplyStream, started_at: float) -> tuple[float, str]:
    """Return the seconds to the first delta and the complete text."""
    first, text = 0.0, ""
    async for delta in stream:
        first = first or time.perf_counter() - started_at
        text += delta
    return first or time.perf_counter() - started_at, text


def _write_card(path: Path, checkpoint: Path, context_length: int, slots: int) -> Path:
    """Write the 7B card with other token limits, `slots` slots and a quota that no benchmark exceeds."""
    limit = min(context_length, read_config(checkpoint).max_positions)
    shipped = resources.files("llama2_server") / "cards" / "llama-2-7b-chat-fp16.yaml"
    document = next(yaml.safe_load_all(shipped.read_text(encoding="utf-8")))
    properties = {entry["property_id"]: entry for entry in document["model"]["properties"]}
    for name in ("context_length_limit", "sequence_length_limit"):
        properties[name]["value"] = str(limit)
    constellation = yaml.safe_load(properties["constellation_config"]["value"])
    constellation["max_requests_per_min"]["default"] = 100_000
    constellation["max_concurrent_requests"] = slots
    properties["constellation_config"]["value"] = yaml.safe_dump(constellation)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path
