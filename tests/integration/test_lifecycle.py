"""Warm-up, readiness, the watchdog and what a drain costs, over a real socket, on a scripted model."""

import asyncio
import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc
import grpc.aio
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from tests.integration.usage.conftest import locked, stored
from tests.support.scripted_model import ScriptedModel
from tests.support.service import Service, ServiceMaker, details, health_stub, hold_slot, until, with_config
from tests.support.virtual_time import run_virtual

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.server import SERVICES
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.engine import Engine
from llama2_server.generation import supervised_engine
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.lifecycle import drain
from llama2_server.lifecycle.model_loading import LoadingProgress
from llama2_server.lifecycle.readiness import Readiness
from llama2_server.lifecycle.warm_up import Speed, warn_if_timeouts_too_short

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def usage(service: Service) -> account_pb2.GetUsageResponse:
    """What the caller's account has used, and what is left of its quota."""
    return await account_pb2_grpc.AccountServiceStub(service.channel).GetUsage(account_pb2.GetUsageRequest())


async def state(service: Service, name: str = "") -> int:
    """What the health service says of a name."""
    answer = await health_stub(service.channel).Check(health_pb2.HealthCheckRequest(service=name))
    return int(answer.status)


def limited(card: ModelCard, requests: int) -> ModelCard:
    """A card with this quota, and no response cache."""
    return with_config(
        card, infer_response_cache=None, max_requests_per_min=RequestsPerMinute(default=requests, accounts={})
    )


class TestWarmUp:
    async def test_is_a_generation_that_nobody_pays_for(self, serve_scripted: ServiceMaker, tmp_path: Path) -> None:
        """Before SERVING the model has generated; no quota is taken and nothing is recorded."""
        async with serve_scripted() as service:
            assert service.model.decoded_rows
            told = await usage(service)
            assert (told.quota.requests_left, list(told.days)) == (told.quota.max_requests_per_min, [])
        assert await stored(f"sqlite:///{tmp_path / 'usage.db'}") == []

    async def test_a_model_that_cannot_generate_is_not_served(self, serve_scripted: ServiceMaker) -> None:
        """A failure of the warm-up ends the start, before the port opens."""
        with pytest.raises(ConfigurationError, match="cannot generate"):
            async with serve_scripted(failure=RuntimeError("broken")):
                raise AssertionError("it is served")

    def test_slowness_is_warned_of(self, demo_card: ModelCard, caplog: pytest.LogCaptureFixture) -> None:
        """Where the longest generation outlasts the grace of a connection, or a step the watchdog, the log says so."""
        settings = Settings.model_validate({})
        warn_if_timeouts_too_short(settings, demo_card, Speed(prefill_seconds=0.001, decode_seconds=0.01), 512)
        assert not caplog.messages
        warn_if_timeouts_too_short(settings, demo_card, Speed(prefill_seconds=0.2, decode_seconds=10.0), 512)
        assert [message.partition(":")[0] for message in caplog.messages] == [
            "--max-connection-age-grace-seconds",
            "--engine-step-timeout-seconds",
        ]


class TestReadiness:
    async def test_an_idle_server_proves_itself(self, serve_scripted: ServiceMaker) -> None:
        """A server that nobody calls generates now and then; nobody pays, and callers' quotas are untouched."""
        async with serve_scripted(readiness_probe_interval_seconds=0.05) as service:
            await until(lambda: service.model.probes >= 3)
            told = await usage(service)
            assert (told.quota.requests_left, list(told.days)) == (told.quota.max_requests_per_min, [])

    async def test_a_probe_takes_no_place_in_line(self, serve_scripted: ServiceMaker) -> None:
        """A caller who comes during a probe to a server without a line is served."""
        async with serve_scripted(readiness_probe_interval_seconds=0.05, max_queue_size=0) as service:
            service.model.gate()
            await asyncio.to_thread(service.model.in_step.wait, 10)  # the probe
            call = asyncio.create_task(_generate(service))
            await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())  # the call has come
            service.model.open_gate()
            assert (await call).response

    async def test_a_fault_is_not_serving_until_a_probe_works(self, serve_scripted: ServiceMaker) -> None:
        """After a failed generation every service is NOT_SERVING, and SERVING again without any caller's help."""
        async with serve_scripted() as service:
            watches = [
                health_stub(service.channel).Watch(health_pb2.HealthCheckRequest(service=name))
                for name in ("", SERVICES[0])
            ]
            assert [(await watch.read()).status for watch in watches] == [SERVING] * 2
            service.model.failure = RuntimeError("broken")
            with pytest.raises(grpc.aio.AioRpcError):
                await _generate(service)
            assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 2
            assert await state(service, "liveness") == SERVING
            service.model.failure = None
            assert [(await watch.read()).status for watch in watches] == [SERVING] * 2

    def test_probes_wait_for_an_idle_moment(self) -> None:
        """While callers are there none is disturbed, however long; then one probe an interval of silence."""
        probes: list[float] = []
        busy_until = 1000.0

        async def scene() -> None:
            loop = asyncio.get_running_loop()

            async def probe() -> bool:
                probes.append(loop.time())
                return True

            readiness = Readiness(lambda serving: None, interval_seconds=60)
            running = asyncio.create_task(readiness.run(probe, idle=lambda: loop.time() >= busy_until))
            await asyncio.sleep(1100)
            readiness.record_outcome(succeeded=True)  # a caller's generation
            await asyncio.sleep(59)
            assert len(probes) == 2
            running.cancel()

        run_virtual(scene())
        assert probes[0] == pytest.approx(1000, abs=1)
        assert probes[1] == pytest.approx(probes[0] + 60)

    @pytest.mark.parametrize("succeeds", [1, 2, 3, None])
    def test_three_failed_probes_in_a_row_are_the_end(self, succeeds: int | None) -> None:
        """Probes run at once, after 1 and after 2 more seconds, although clients fail all the time.

        A success before the third failure makes the server SERVING again; the next failure starts a new count.
        """
        probes: list[float] = []
        states: list[bool] = []

        async def scene() -> None:
            loop = asyncio.get_running_loop()

            async def probe() -> bool:
                probes.append(loop.time())
                return len(probes) == succeeds

            readiness = Readiness(states.append, interval_seconds=60)
            running = asyncio.create_task(readiness.run(probe, idle=lambda: False))
            await asyncio.sleep(1)
            while not running.done() and loop.time() < 10 and True not in states:
                readiness.record_outcome(succeeded=False)  # a client's generation
                await asyncio.sleep(0.125)
            assert running.done() == (succeeds is None)
            running.cancel()

        run_virtual(scene())
        assert probes == pytest.approx([1, 2, 4][:succeeds])
        assert states == [False] if succeeds is None else [False, True]

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), None])
    async def test_a_request_that_fails_alone_changes_nothing(
        self, serve_scripted: ServiceMaker, error: Exception | None
    ) -> None:
        """Out of memory and logits that are not finite (None) are INTERNAL, and the server stays SERVING."""
        async with serve_scripted() as service:
            watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            service.model.failure, service.model.nan_logits = error, error is None
            for _ in range(4):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await _generate(service)
                assert failed.value.code() is grpc.StatusCode.INTERNAL
            service.model.failure, service.model.nan_logits = None, False
            assert (await _generate(service)).response
            assert service.model.probes == 0
            change = asyncio.create_task(watch.read())
            assert await state(service) == SERVING
            assert not change.done()
            change.cancel()


class TestWatchdog:
    async def test_a_step_that_hangs_fails_its_request_and_who_waits(
        self, serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
    ) -> None:
        """UNAVAILABLE with RetryInfo for both, NOT_SERVING, still alive; what was computed is recorded."""
        async with serve_scripted(engine_step_timeout_seconds=0.5, card=limited(demo_card, 10)) as service:
            running = await hold_slot(service)
            waiting = asyncio.create_task(_generate(service))
            for call, reason in ((running.read(), "ENGINE_UNAVAILABLE"), (waiting, "SHUTTING_DOWN")):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await call
                assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
                found = details(failed.value)
                assert isinstance(found["ErrorInfo"], error_details_pb2.ErrorInfo)
                assert found["ErrorInfo"].reason == reason
                assert "RetryInfo" in found
            assert await state(service) == NOT_SERVING
            assert await state(service, "liveness") == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await _generate(service)
            assert late.value.code() is grpc.StatusCode.UNAVAILABLE
            assert (await usage(service)).quota.requests_left == 8
        records = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
        assert sorted((record.outcome, record.output_tokens) for record in records) == [
            ("UNAVAILABLE", 0),
            ("UNAVAILABLE", 1),
        ]
        assert max(record.input_tokens for record in records) > 0

    async def test_a_step_that_hangs_holds_up_no_drain(
        self, serve_scripted: ServiceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its call gets UNAVAILABLE when the grace is over, what was computed is recorded, and the drain ends."""
        monkeypatch.setattr(drain, "ENGINE_STOP_TIMEOUT_SECONDS", 0.1)
        try:
            async with asyncio.timeout(30), serve_scripted(shutdown_grace_seconds=0) as service:
                monkeypatch.setattr(service.model, "open_gate", lambda: None)  # nor does it end with the drain
                reading = asyncio.create_task((await hold_slot(service)).read())
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                await reading
            assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            ScriptedModel.open_gate(service.model)
        (record,) = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
        assert (record.outcome, record.output_tokens) == ("UNAVAILABLE", 1)

    def test_slow_steps_are_no_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A generation may take much longer than a step may: only a single step counts."""

        async def scene() -> None:
            clock = asyncio.get_running_loop().time
            monkeypatch.setattr(supervised_engine, "time", SimpleNamespace(monotonic=clock))
            engine = SimpleNamespace(alive=True, step_started_at=None)
            watched = SupervisedEngine(cast(Engine, engine), engine_step_timeout_seconds=0.5)
            watching = asyncio.create_task(watched.wait_until_failed())
            for _ in range(20):
                engine.step_started_at = clock()
                await asyncio.sleep(0.375)
            assert not watched.failed
            await watching  # while the last of them goes on
            assert clock() == engine.step_started_at + 0.5

        run_virtual(scene())


class TestQuota:
    async def test_what_the_ledger_refuses_costs_no_quota(
        self, serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
    ) -> None:
        """A call that cannot be recorded is USAGE_JOURNAL_FULL, each time it is tried, and costs no quota."""
        async with serve_scripted(card=limited(demo_card, 10**4), usage_journal_max_bytes=64 * 1024) as service:
            with locked(tmp_path / "usage.db"):
                admitted, refusals = 0, 0
                while refusals < 4:
                    try:
                        await _generate(service)
                        admitted += 1
                    except grpc.aio.AioRpcError as error:
                        info = details(error)["ErrorInfo"]
                        assert isinstance(info, error_details_pb2.ErrorInfo)
                        assert info.reason == "USAGE_JOURNAL_FULL"
                        refusals += 1
            assert (await usage(service)).quota.requests_left == 10**4 - admitted

    async def test_what_the_quota_refuses_is_not_recorded(
        self, serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
    ) -> None:
        """One record for the call that was admitted, none for those beyond the quota."""
        async with serve_scripted(card=limited(demo_card, 1)) as service:
            await _generate(service)
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await _generate(service)
        assert len(await stored(f"sqlite:///{tmp_path / 'usage.db'}")) == 1


class TestLoadingProgress:
    def test_is_a_log_line_every_tenth(self, caplog: pytest.LogCaptureFixture) -> None:
        """Where there is no terminal: ten lines, not one for every tensor, with figures for machines."""
        with caplog.at_level(logging.INFO), LoadingProgress(on_terminal=False) as progress:
            for done in range(1, 1001):
                progress.show(done * 10**7, 10**10)
        percents = [vars(record)["percent"] for record in caplog.records]
        assert percents == list(range(10, 101, 10))
        assert caplog.messages[0] == "loading weights: 10% of 10.0 GB"
        assert vars(caplog.records[0])["bytes_loaded"] == 10**9

    def test_is_a_bar_on_a_terminal(self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a terminal: one bar, and no log lines."""
        terminal = io.StringIO()
        monkeypatch.setattr("sys.stderr", terminal)
        with caplog.at_level(logging.INFO), LoadingProgress(on_terminal=True) as progress:
            progress.show(10**9, 10**10)
        assert "loading weights:" in terminal.getvalue()
        assert not caplog.messages


async def _generate(service: Service) -> pb.GenerateResponse:
    return await service.text.Generate(pb.GenerateRequest(prompt="a story"))
