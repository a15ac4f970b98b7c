"""Stores and the disk that fail: the log, the health names, the metrics and the status of calls are true."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from tests.integration.usage.conftest import fill, mounted_disk, stored
from tests.support.servers.postgres_server import PostgresCluster
from tests.support.servers.redis_server import RedisServer, running_redis
from tests.support.service import Service, ServiceMaker, details, health_stub, until, wait_for_health

from llama2.v1 import text_generation_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis."""
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 4 MB."""
    with mounted_disk(tmp_path / "disk") as disk:
        yield disk


async def state(service: Service, name: str = "") -> int:
    """Return the state of a health name."""
    return int((await health_stub(service.channel).Check(health_pb2.HealthCheckRequest(service=name))).status)


async def generate(service: Service, times: int) -> None:
    """Generate several times, until a call fails."""
    for _ in range(times):
        await service.text.Generate(pb.GenerateRequest(prompt="a story"))


async def rejection(service: Service) -> str:
    """Generate, and return the reason of the rejection, which is UNAVAILABLE with RetryInfo."""
    with pytest.raises(grpc.aio.AioRpcError) as rejected:
        await service.text.Generate(pb.GenerateRequest(prompt="a story"))
    assert rejected.value.code() is grpc.StatusCode.UNAVAILABLE
    found = details(rejected.value)
    assert "RetryInfo" in found
    return str(found["ErrorInfo"].reason)  # type: ignore[attr-defined]


def metric(service: Service, name: str) -> float | None:
    """Return the value of a metric without labels."""
    return service.metrics.registry.get_sample_value(name)


async def test_redis_that_is_unavailable_at_the_start(
    serve_scripted: ServiceMaker, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any call the log has it; only `quota-store` is NOT_SERVING; it recovers without any call, too."""
    redis.kill()
    async with serve_scripted(redis_url=redis.url) as service:
        await wait_for_health(service, NOT_SERVING, "quota-store")
        assert f"the quota store at {redis.address} does not answer (ConnectionError)" in caplog.messages
        assert (await state(service), await state(service, "usage-store")) == (SERVING, SERVING)
        assert metric(service, "llama2_quota_store_up") == 0
        assert await rejection(service) == "QUOTA_STORE_UNAVAILABLE"
        redis.start()
        await wait_for_health(service, SERVING, "quota-store")
        assert metric(service, "llama2_quota_store_up") == 1
        assert f"the quota store at {redis.address} answers again" in caplog.messages
        assert (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).response
        assert await state(service) == SERVING


async def test_redis_that_hangs_is_noticed_without_calls(serve_scripted: ServiceMaker, redis: RedisServer) -> None:
    """Redis stops to answer while no call runs: the watch of `quota-store` changes, the other names do not."""
    async with serve_scripted(redis_url=redis.url) as service:
        stub = health_stub(service.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="quota-store"))
        assert (await watch.read()).status == SERVING
        redis.freeze()
        assert (await watch.read()).status == NOT_SERVING
        assert await state(service) == SERVING
        redis.thaw()
        assert (await watch.read()).status == SERVING
        assert (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).response


async def test_postgresql_that_is_unavailable(
    serve_scripted: ServiceMaker, postgres: PostgresCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Only `usage-store` is NOT_SERVING, at once; calls are served, and their records follow."""
    url = postgres.new_database()
    async with serve_scripted(usage_url=url) as service:
        await wait_for_health(service, SERVING, "usage-store")
        await asyncio.to_thread(postgres.stop)
        try:
            await wait_for_health(service, NOT_SERVING, "usage-store")
            assert any(message.startswith("the usage store is unavailable") for message in caplog.messages)
            assert metric(service, "llama2_usage_store_up") == 0
            assert (await state(service), await state(service, "quota-store")) == (SERVING, SERVING)
            assert (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).response
        finally:
            await asyncio.to_thread(postgres.start)
        await wait_for_health(service, SERVING, "usage-store")
        assert metric(service, "llama2_usage_store_up") == 1
        assert "the usage store is available again" in caplog.messages
    assert len(await stored(url)) == 1


async def test_full_disk_changes_the_readiness(
    serve_scripted: ServiceMaker, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is NOT_SERVING before the first call is rejected, and SERVING when it has space again."""
    async with serve_scripted(data_directory=small_disk) as service:
        assert (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).response
        watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        filler = small_disk / "filler"
        fill(filler)
        assert (await watch.read()).status == NOT_SERVING
        assert metric(service, "llama2_usage_disk_writable") == 0
        assert any("the usage database is not writable" in message for message in caplog.messages)
        with pytest.raises(grpc.aio.AioRpcError) as rejected:  # the log has space for some records
            await generate(service, times=100)
        assert rejected.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "RetryInfo" in details(rejected.value)
        assert await state(service, "liveness") == SERVING
        filler.unlink()
        assert (await watch.read()).status == SERVING
        assert (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).response
        await until(lambda: metric(service, "llama2_usage_pending_records") == 0)
    assert len(await stored(f"sqlite:///{small_disk / 'usage.db'}")) >= 2
