"""Faults at the end of a sequence and of its slot: no call hangs, and the next request gets the slot."""

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from tests.integration.usage.conftest import stored
from tests.support.faults import FaultPoint
from tests.support.processes import command, environment
from tests.support.service import Service, ServiceMaker, details, health_stub, hold_slot, wait_for_health

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.stop_sequences import StopMatcher
from llama2_server.generation.generation import Generation
from llama2_server.generation.text_stream import TextStream
from llama2_server.lifecycle.supervision import EXIT_ENGINE_FAILED

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# Owner and name of the faulty function, and the status of the call whose sequence ends there.
FAULT_POINTS: dict[str, tuple[Any, str, str]] = {
    "the detokenizer's flush": (Detokenizer, "flush", "INTERNAL"),
    "the stop matcher's push": (StopMatcher, "push", "INTERNAL"),
    "the stop matcher's flush": (StopMatcher, "flush", "INTERNAL"),
    "the listener's on_finish": (TextStream, "on_finish", "INTERNAL"),
    "the generation's on_finish": (Generation, "_set_finished", "INTERNAL"),
    "returning the KV slot": (PrefixCache, "release", "OK"),
    "updating the mean": (RequestQueue, "_update_mean_hold", "OK"),
    "handing the slot on": (RequestQueue, "_grant_next", "OK"),
}


async def generate(service: Service, prompt: str = "a story") -> str:
    """Generate, and return the name of the call's status."""
    call = service.text.Generate(pb.GenerateRequest(prompt=prompt), timeout=30)
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        assert details(failed.value)
    return str(code.name)


async def status(service: Service) -> int:
    """Return the state of the whole server."""
    return int((await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())).status)


@pytest.mark.parametrize("name", FAULT_POINTS)
async def test_a_fault_at_the_end_frees_the_slot(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """One call meets the fault while another waits: both end, the slot is free, health recovers, both are recorded."""
    owner, function, code = FAULT_POINTS[name]
    fault = FaultPoint(monkeypatch, owner, function)
    # The script ends with the end-of-sequence token, which only the end of the sequence passes to the functions above.
    async with asyncio.timeout(60), serve_scripted(reply="Once") as service:
        running = await hold_slot(service)
        waiting = asyncio.create_task(generate(service))
        await service.wait_until_queued(1)
        fault.arm()
        service.model.open_gate()
        assert await _status_of(running) == code
        assert await waiting == "OK"
        assert fault.raised == 1
        await wait_for_health(service, SERVING)
        assert await generate(service) == "OK"
        assert service.metrics.registry.get_sample_value("llama2_requests_running") == 0
    outcomes = sorted(record.outcome for record in await stored(f"sqlite:///{tmp_path / 'usage.db'}"))
    ended = "END_OF_SEQUENCE"
    assert outcomes == sorted([ended, ended, ended if code == "OK" else code])


@pytest.mark.parametrize("name", FAULT_POINTS)
async def test_a_fault_that_persists_hangs_no_call(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """While the fault lasts, every call ends with a status; after it, the server serves or has declared its end."""
    owner, function, _ = FAULT_POINTS[name]
    fault = FaultPoint(monkeypatch, owner, function)
    async with asyncio.timeout(60), serve_scripted(reply="Once", queue_timeout_seconds=2) as service:
        fault.arm(10**6)
        codes = await asyncio.gather(*(generate(service) for _ in range(3)))
        assert set(codes) <= {"OK", "INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED"}
        fault.disarm()
        if name == "returning the KV slot":  # the engine cannot confirm that the slot is free
            assert await status(service) == NOT_SERVING
            assert await generate(service) == "UNAVAILABLE"
        else:
            await wait_for_health(service, SERVING)
            assert await generate(service) == "OK"


def test_a_slot_that_the_engine_cannot_free_ends_the_process(tmp_path: Path) -> None:
    """The engine cannot release its KV slot: the process exits with 70."""
    flags = command(
        "loses-its-slot",
        "--data-directory",
        str(tmp_path),
        "--listen",
        "127.0.0.1:0",
        "--readiness-probe-interval-seconds",
        "0.1",
        module="tests.support.scripted_process",
    )
    done = subprocess.run(flags, capture_output=True, text=True, timeout=60, check=False, env=environment())
    assert done.returncode == EXIT_ENGINE_FAILED
    assert "the engine did not release a KV cache slot" in done.stderr


async def _status_of(call: Any) -> str:
    async with asyncio.timeout(30):
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        return str((await call.code()).name)
