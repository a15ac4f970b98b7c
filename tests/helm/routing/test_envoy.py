"""The chart's Envoy with a real Envoy and real servers: it balances requests, serves every route, and drains."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from tests.helm.chart import NAMESPACE, Values, render
from tests.helm.routing.envoy_pod import running_envoy_pod
from tests.support.certificates import Authority
from tests.support.processes import server
from tests.support.servers.envoy_server import Envoy
from tests.support.servers.name_server import running_name_server
from tests.support.service import ONE_PORT_HOSTS, ServiceMaker, needs_one_port_hosts

from llama2_client import Client

DEMO: Values = {"demo": True, "replicas": 2, "quotas": "perReplica", "envoy": {"enabled": True}}
PROMPT = "Tell me a story about a fox."
HOSTED = "/client/v4/accounts/anonymous/ai/run/@demo/storyteller"
MOUNTS = ("/etc/llama2/envoy-tls", "/etc/llama2/ca", "/etc/llama2/client")
WAVES, CALLS = 5, 10


@asynccontextmanager
async def two_servers_behind_envoy(folder: Path) -> AsyncIterator[Envoy]:
    """Run two server processes with the demo model behind one name, and the chart's Envoy in front of them."""
    async with AsyncExitStack() as stack:
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS[:2]))
        port = "0"
        for host in ONE_PORT_HOSTS[:2]:
            (folder / host).mkdir()
            _, address = stack.enter_context(server(folder / host, listen=f"{host}:{port}"))
            port = address.rpartition(":")[2]
        envoy = await stack.enter_async_context(running_envoy_pod(render(DEMO), folder, f"x:{port}", names))
        envoy.http.timeout = httpx2.Timeout(None)  # the test's own limit is enough
        yield envoy


async def sent(envoy: Envoy) -> list[int]:
    """Return the number of requests that Envoy has sent to each server, without health checks."""
    clusters = (await envoy.http.get(f"http://{envoy.admin}/clusters?format=json")).json()
    (cluster,) = clusters["cluster_statuses"]
    return [
        int(stat.get("value", 0))
        for host in cluster["host_statuses"]
        for stat in host["stats"]
        if stat["name"] == "rq_total"
    ]


async def shares(call: Callable[[], Awaitable[object]], envoy: Envoy) -> list[int]:
    """Make concurrent calls in waves, and return how many of them each server has got."""
    while not all(await sent(envoy)):
        await asyncio.gather(*(call() for _ in range(CALLS)))
    before = await sent(envoy)
    for _ in range(WAVES):
        await asyncio.gather(*(call() for _ in range(CALLS)))
    counts = [after - earlier for after, earlier in zip(await sent(envoy), before, strict=True)]
    assert (len(counts), sum(counts)) == (2, WAVES * CALLS)
    return counts


@pytest.mark.timeout(900)  # two starts and 150 generations on a busy machine
@needs_one_port_hosts
async def test_requests_of_each_protocol_are_balanced(tmp_path: Path) -> None:
    """Two servers get 50 requests within 10%: gRPC over one connection, JSON, and the former host's URL."""
    async with two_servers_behind_envoy(tmp_path) as envoy, Client(envoy.address) as client:

        async def grpc_call() -> None:
            await client.generate(PROMPT, max_tokens=8, no_cache=True)

        async def json_call(path: str) -> None:
            reply = await envoy.post({"prompt": PROMPT, "max_tokens": 8, "no_cache": True}, path)
            assert reply.status_code == 200, reply.text

        calls = (grpc_call, lambda: json_call("/v1/generate"), lambda: json_call(HOSTED))
        for call in calls:
            counts = await shares(call, envoy)
            assert max(counts) <= 1.1 * WAVES * CALLS / 2, counts
        stats = await envoy.http.get(f"http://{envoy.admin}/stats?filter=^http.http.downstream_cx_http2_total$")
        assert stats.text.strip().endswith(": 1")


async def ready(envoy: Envoy) -> int:
    """Return the status of the readiness probe."""
    return (await envoy.http.get(f"http://127.0.0.1:{envoy.health_port}/ready")).status_code


async def test_all_protocols_and_the_times_of_the_release(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Events, errors as JSON and gRPC-Web pass; only the listed web pages may call; the idle time fits the release."""
    values = DEMO | {"envoy": {"enabled": True, "allowOrigins": ["https://chat.example.com"]}}
    release = render(values)
    async with (
        serve_scripted("Once upon a time.") as service,
        running_envoy_pod(release, tmp_path, service.address) as envoy,
    ):
        assert await ready(envoy) == 200
        stream = await envoy.post({"prompt": "hi", "stream": True})
        assert stream.headers["content-type"] == "text/event-stream", stream.text
        assert '"completion"' in stream.text
        rejected = await envoy.post({"prompt": "hi", "top_p": 2})
        assert (rejected.status_code, rejected.json()["code"]) == (400, 3)
        web = await envoy.http.post(
            "/llama2.v1.ModelService/GetModelCard",
            content=bytes(5),
            headers={"content-type": "application/grpc-web+proto", "origin": "https://chat.example.com"},
        )
        assert web.headers["access-control-allow-origin"] == "https://chat.example.com"
        assert b"grpc-status:0" in web.content
        other = await envoy.post({"prompt": "hi"}, origin="http://localhost:3000")
        assert "access-control-allow-origin" not in other.headers
        config = (await envoy.http.get(f"http://{envoy.admin}/config_dump")).text
        grace = release.env["LLAMA2_MAX_CONNECTION_AGE_GRACE_SECONDS"]
        assert f'"stream_idle_timeout": "{grace}s"' in config


async def test_envoy_uses_and_serves_certificates(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Envoy presents its certificate to servers that require one, checks theirs, and serves clients by TLS."""
    authority = Authority(tmp_path)
    mounts = {path: tmp_path / path.rpartition("/")[2] for path in MOUNTS}
    for path, local in mounts.items():
        local.mkdir()
        authority.write(authority.issue("localhost" if path == MOUNTS[0] else "envoy"), local)
    authority.root_file().rename(mounts["/etc/llama2/ca"] / "ca.crt")
    secrets = {"tls": {"secret": "a", "clientCaSecret": "b"}, "test": {"enabled": False}}
    envoy_values = {"enabled": True, "tls": {"secret": "c"}, "clientSecret": "d"}
    release = render(DEMO | secrets | {"envoy": envoy_values})
    for name, works in ((f"llama2.{NAMESPACE}.svc", True), ("another", False)):
        folder = tmp_path / name
        folder.mkdir()
        certificate, key = authority.write(authority.issue(name), folder)
        tls = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": mounts["/etc/llama2/ca"] / "ca.crt"}
        async with (
            serve_scripted("Once upon a time.", data_directory=folder / "data", **tls) as service,
            running_envoy_pod(release, folder, service.address, mounts=mounts) as envoy,
        ):
            context = ssl.create_default_context(cafile=mounts["/etc/llama2/ca"] / "ca.crt")
            port = envoy.address.rpartition(":")[2]
            async with httpx2.AsyncClient(trust_env=False, timeout=30, verify=context) as client:
                reply = await client.post(f"https://localhost:{port}/v1/generate", json={"prompt": "hi"})
            assert reply.status_code == (200 if works else 503), envoy.log


async def test_the_drain_waits_for_running_requests(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """The preStop command fails the readiness probe at once, closes connections, and ends with the last request."""
    release = render(DEMO | {"drain": {"preStopSeconds": 0}})
    ((container,),) = (pod["spec"]["containers"] for pod in release.envoys)
    bash, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
    async with (
        serve_scripted("Once upon a time.") as service,
        running_envoy_pod(release, tmp_path, service.address) as envoy,
    ):
        service.model.gate()
        running = asyncio.create_task(envoy.post({"prompt": "long"}))
        await service.wait_until_in_step()
        assert "127.0.0.1/9901" in script
        local = script.replace("127.0.0.1/9901", envoy.admin.replace(":", "/"))
        drain = await asyncio.create_subprocess_exec(bash, flag, local, stdout=subprocess.DEVNULL)
        async with asyncio.timeout(20):
            while await ready(envoy) != 503:
                pass
        card = await envoy.post({}, "/llama2.v1.ModelService/GetModelCard")
        assert (card.status_code, card.headers["connection"]) == (200, "close")
        assert drain.returncode is None
        service.model.open_gate()
        assert (await running).status_code == 200
        assert await drain.wait() == 0
