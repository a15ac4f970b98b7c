"""Our whole service as a contender: a server process, called over gRPC from this one."""

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

from benchmarks.engines.under_test import NotRun, Run
from benchmarks.prompts import Prompt
from llama2_client import Client, Message, ReplyStream
from llama2_server.engine.checkpoint.files import read_config

NO_DEADLINE = 3600.0
MOST_REUSED = 8  # tokens that prompts have in common by chance


class Service:
    """A server on a checkpoint, under the 7B card with other limits; `address` is where it serves.

    What it keeps from one start to the next is in `data_directory`, by default in one that ends with it.
    """

    def __init__(
        self, checkpoint: Path, *, context_length: int, slots: int, data_directory: Path | None = None
    ) -> None:
        """Start it, and wait until it serves; `start_seconds` is how long that took."""
        self._slots = slots
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        card = _write_card(folder / "card.yaml", checkpoint, context_length, slots)
        command = [sys.executable, "-m", "llama2_server", "--listen", "127.0.0.1:0", "--card", str(card)]
        command += ["--weights", str(checkpoint), "--data-directory", str(data_directory or folder / "data")]
        begun = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        self.start_seconds = time.perf_counter() - begun
        if not line.startswith("SERVING on "):
            self.close()
            raise NotRun("the server did not start")
        self.address = line.split()[2].rstrip(".")

    @property
    def process_id(self) -> int:
        """The server's."""
        return self._process.pid

    def about(self) -> dict[str, Any]:
        """Its arithmetic is the engine's."""
        packages = ("torch", "grpcio")
        versions = {package: metadata.version(package) for package in packages}
        return {"arithmetic": "float16 weights, float32", "versions": versions}

    def generate(self, prompts: list[Prompt], tokens: int) -> Run:
        """Stream all replies at once, over one connection that is open before."""
        return asyncio.run(self._generate(prompts, tokens))

    def first_token_seconds(self, messages: list[Message], tokens: int = 2) -> float:
        """Time to the first token of a chat's next reply."""

        async def first() -> float:
            async with Client(self.address, timeout=NO_DEADLINE) as client:
                await client.health()
                begun = time.perf_counter()
                reply = client.stream(messages=messages, max_tokens=tokens, temperature=0, no_cache=True)
                seconds, _ = await _timed(reply, begun)
                return seconds

        return asyncio.run(first())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._folder.cleanup()

    async def _generate(self, prompts: list[Prompt], tokens: int) -> Run:
        async with Client(self.address, timeout=NO_DEADLINE) as client:
            await self._forget(client)
            begun = time.perf_counter()
            replies = [
                client.stream(prompt.text, raw=True, max_tokens=tokens, temperature=0, no_cache=True)
                for prompt in prompts
            ]
            firsts, texts = zip(*await asyncio.gather(*(_timed(reply, begun) for reply in replies)), strict=True)
            total = time.perf_counter() - begun
        if any(reply.reply.reused_input_tokens > MOST_REUSED for reply in replies):
            raise RuntimeError("the service knew a prompt that was to be new to it")
        return Run(sum(reply.reply.output_tokens for reply in replies), max(firsts), total, texts=list(texts))

    async def _forget(self, client: Client) -> None:
        """Put something else into every slot: a measurement that is repeated would find its own prompt there."""
        letters = string.ascii_letters[: self._slots]
        await asyncio.gather(
            *(client.generate(letter * 16, raw=True, max_tokens=1, no_cache=True) for letter in letters)
        )


async def _timed(reply: ReplyStream, begun: float) -> tuple[float, str]:
    """Seconds to the first piece of text, and the whole text."""
    first, text = 0.0, ""
    async for delta in reply:
        first = first or time.perf_counter() - begun
        text += delta
    return first or time.perf_counter() - begun, text


def _write_card(path: Path, checkpoint: Path, context_length: int, slots: int) -> Path:
    """The 7B card with other token limits, as many slots, and a quota that no benchmark exceeds."""
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
