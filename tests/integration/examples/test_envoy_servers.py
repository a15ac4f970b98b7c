"""`examples/envoy` with a real Envoy: several, crashed and draining servers."""

import asyncio
import contextlib
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2
from tests.integration.examples.conftest import REPLY
from tests.integration.examples.envoy_responses import details
from tests.support.servers.envoy_server import Envoy, running_envoy
from tests.support.servers.name_server import running_name_server
from tests.support.service import ONE_PORT_HOSTS, Service, ServiceMaker, needs_one_port_hosts, prefills, three_services


async def until_health_checks_fail(envoy: Envoy, count: int = 1) -> None:
    """Wait until Envoy's health checks have failed for this many servers."""
    async with asyncio.timeout(20):
        down = 0
        while down < count:
            clusters = (await envoy.http.get(f"http://{envoy.admin}/clusters?format=json")).json()
            (cluster,) = clusters["cluster_statuses"]
            hosts = cluster.get("host_statuses", [])
            down = sum(host["health_status"].get("failed_active_health_check", False) for host in hosts)


async def test_unavailable_or_draining_servers_are_503(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """When the only server drains, queued and later requests get 503 and Retry-After; the running one completes."""
    async with AsyncExitStack() as life:
        service = await life.enter_async_context(serve_scripted(REPLY, max_queue_size=1))
        async with running_envoy(tmp_path, service.address) as envoy:
            service.model.gate()
            running = asyncio.create_task(envoy.post({"prompt": "running"}))
            await asyncio.to_thread(service.model.in_step.wait, 10)
            # The queue has room for one of two requests: when one is rejected, the other is queued.
            requests = {asyncio.create_task(envoy.post({"prompt": "queued"})) for _ in range(2)}
            (full,), (queued,) = await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
            assert full.result().status_code == 429
            await life.aclose()
            assert (await running).json()["response"] == REPLY
            later = await envoy.post({"prompt": "later"})
            await until_health_checks_fail(envoy)
            last = await envoy.post({"prompt": "last", "stream": True})
            for rejected in (await queued, later, last):
                assert rejected.status_code == 503
                assert rejected.json()["code"] == 14
                details(rejected)
                assert int(rejected.headers["retry-after"]) >= 1
            assert last.json()["message"] == "no healthy upstream"


async def hold_requests(
    envoy: Envoy, services: list[Service], calls: int | None = None
) -> list["asyncio.Task[httpx2.Response]"]:
    """Start requests that are held in their first step, each on another server; every model is gated."""
    for service in services:
        service.model.gate()
    held = []
    for count in range(1, (calls or len(services)) + 1):
        held.append(asyncio.create_task(envoy.post({"prompt": "long", "stream": count > 1})))
        async with asyncio.timeout(20):
            while sum(service.model.in_step.is_set() for service in services) < count:
                await asyncio.sleep(0)
    return held


async def until_active(envoy: Envoy, count: int) -> None:
    """Wait until Envoy has this many active requests to servers."""
    async with asyncio.timeout(20):
        while True:
            stats = (
                await envoy.http.get(f"http://{envoy.admin}/stats?filter=^cluster.llama2.upstream_rq_active$")
            ).text
            if int(stats.rpartition(":")[2]) == count:
                return


@needs_one_port_hosts
async def test_requests_go_to_the_server_with_the_fewest(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Long requests hold two of three servers behind one name; all others go to the third."""
    async with three_services(serve_scripted, tmp_path) as services:
        with running_name_server(*ONE_PORT_HOSTS) as names:
            async with running_envoy(tmp_path, services[0].address, names) as envoy:
                held = await hold_requests(envoy, services, calls=2)
                (idle,) = [service for service in services if not service.model.in_step.is_set()]
                idle.model.open_gate()
                for _ in range(6):
                    assert (await envoy.post({"prompt": "short"})).status_code == 200
                assert idle.model.prefills == sum(prefills(services)) == 6
                for service in services:
                    service.model.open_gate()
                assert [reply.status_code for reply in await asyncio.gather(*held)] == [200, 200]


@needs_one_port_hosts
async def test_an_unavailable_server_is_skipped(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """When one of two servers stops, no request fails: first due to retries, then due to health checks."""
    async with AsyncExitStack() as life, AsyncExitStack() as stack:
        first = await life.enter_async_context(
            serve_scripted(data_directory=tmp_path / "first", shutdown_grace_seconds=0)
        )
        host = ONE_PORT_HOSTS[1]
        started = serve_scripted(listen=f"{host}:{first.port}", data_directory=tmp_path / "second")
        second = await stack.enter_async_context(started)
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS[:2]))
        envoy = await stack.enter_async_context(running_envoy(tmp_path, first.address, names))

        async def all_succeed() -> None:
            replies = await asyncio.gather(
                *(envoy.post({"prompt": "hi", "stream": index % 2 > 0}) for index in range(8))
            )
            assert {reply.status_code for reply in replies} == {200}

        async with asyncio.timeout(20):
            while not all(prefills([first, second])):  # Envoy selects idle servers at random
                await all_succeed()
        before = sum(prefills([first, second]))
        await life.aclose()
        await all_succeed()
        await until_health_checks_fail(envoy)
        await all_succeed()
        assert sum(prefills([first, second])) == before + 16


class Forwarder:
    """A TCP forwarder that can abort its connections, as a server's crash would."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._writers: list[asyncio.StreamWriter] = []
        self._pipes: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> None:
        """Forward the connections to this address."""
        self._server = await asyncio.start_server(self._connect, host, port)

    async def abort(self) -> None:
        """Close the listener and abort all connections."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._pipes)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, target_writer]
        for source, sink in ((reader, target_writer), (target_reader, writer)):
            self._pipes.add(asyncio.create_task(self._pipe(source, sink)))

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()


@needs_one_port_hosts
async def test_requests_on_a_crashed_server_are_retried_on_another(
    serve_scripted: ServiceMaker, tmp_path: Path
) -> None:
    """Another server answers the requests of a crashed one that had sent nothing yet."""
    async with AsyncExitStack() as stack:
        healthy = await stack.enter_async_context(serve_scripted(REPLY, data_directory=tmp_path / "healthy"))
        crashing = await stack.enter_async_context(serve_scripted(REPLY, data_directory=tmp_path / "crashing"))
        forwarder = Forwarder("127.0.0.1", crashing.port)
        await forwarder.listen(ONE_PORT_HOSTS[1], healthy.port)
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS[:2]))
        envoy = await stack.enter_async_context(running_envoy(tmp_path, healthy.address, names))
        calls = await hold_requests(envoy, [healthy, crashing])
        await forwarder.abort()
        healthy.model.open_gate()
        assert {reply.status_code for reply in await asyncio.gather(*calls)} == {200}
        assert healthy.model.prefills == 2


@needs_one_port_hosts
async def test_queued_requests_of_a_draining_server_move_to_another(
    serve_scripted: ServiceMaker, tmp_path: Path
) -> None:
    """Another server serves the queued requests that a draining server rejects; the clients get 200."""
    async with AsyncExitStack() as life, AsyncExitStack() as stack:
        first = await life.enter_async_context(serve_scripted(REPLY, data_directory=tmp_path / "first"))
        host = ONE_PORT_HOSTS[1]
        started = serve_scripted(REPLY, listen=f"{host}:{first.port}", data_directory=tmp_path / "second")
        second = await stack.enter_async_context(started)
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS[:2]))
        envoy = await stack.enter_async_context(running_envoy(tmp_path, first.address, names))
        calls = await hold_requests(envoy, [first, second])
        calls += [asyncio.create_task(envoy.post({"prompt": "queued"})) for _ in range(4)]
        await until_active(envoy, 6)
        await life.aclose()
        second.model.open_gate()
        assert {reply.status_code for reply in await asyncio.gather(*calls)} == {200}
