"""Coalescing across replicas while one of them drains."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from tests.integration.replicas.conftest import REPLY, Replicas, fail, follow, prefills, rest_of, results
from tests.integration.service.conftest import records
from tests.support.scripted_model import ScriptedModel
from tests.support.service import details, hold_slot, until

from llama2_server.generation.supervised_engine import SupervisedEngine

pytestmark = pytest.mark.usefixtures("patient_leases")


def end_in_a_step(model: ScriptedModel, patch: pytest.MonkeyPatch) -> None:
    """Let the drain end the engine while this gated model is in a step, as if each step took long."""
    close = SupervisedEngine.close

    async def close_in_a_step(engine: SupervisedEngine, timeout_seconds: float) -> None:
        closing = asyncio.create_task(close(engine, timeout_seconds))
        await until(lambda: not engine.alive)
        model.allow(1)
        await closing

    patch.setattr(SupervisedEngine, "close", close_in_a_step)
    patch.setattr(model, "open_gate", lambda: None)


async def test_followers_complete_the_reply_of_a_drained_replica(replica: Replicas, tmp_path: Path) -> None:
    """The grace period ends before the reply: its own call is rejected and pays its tokens, and the text continues."""
    async with replica("b") as b:
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(replica("a", shutdown_grace_seconds=0))
            leader = await hold_slot(a, "a story")
            call, text = await follow(b)
            with pytest.MonkeyPatch.context() as patch:
                end_in_a_step(a.model, patch)
                draining = asyncio.create_task(stack.aclose())
                error = await fail(leader)
                await draining
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "SHUTTING_DOWN"  # type: ignore[attr-defined]
        rest, completion = await rest_of(call)
        assert text + rest == REPLY
        assert (completion.cached, completion.usage.neurons) == (True, "0")
        assert prefills(a, b) == [1, 1]
        assert results(b) == {"joined": 1, "recomputed": 1}
    (of_a,), (of_b,) = list(records(tmp_path / "a")), list(records(tmp_path / "b"))
    assert (of_a["outcome"], of_a["neurons"] > 0) == ("UNAVAILABLE", True)
    assert (of_b["outcome"], of_b["neurons"]) == ("END_OF_SEQUENCE", 0)


async def test_a_drained_replica_completes_the_reply_in_its_grace_period(replica: Replicas) -> None:
    """Its own call and the reader on the other replica get the whole text; nothing is computed again."""
    async with replica("b") as b:
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(replica("a"))
            leader = await hold_slot(a, "a story")
            call, text = await follow(b)
            draining = asyncio.create_task(stack.aclose())
            rest_of_leader, _ = await rest_of(leader)
            await draining
        rest, completion = await rest_of(call)
        assert text + rest == REPLY
        assert REPLY.endswith(rest_of_leader)
        assert completion.cached
        assert prefills(a, b) == [1, 0]
        assert results(b) == {"joined": 1}


async def test_a_follower_of_a_drained_replica_is_told_why(replica: Replicas) -> None:
    """The reader's replica ends, not the owner's: its call gets SHUTTING_DOWN, and the owner's call its reply."""
    async with replica("a") as a:
        async with AsyncExitStack() as stack:
            b = await stack.enter_async_context(replica("b", shutdown_grace_seconds=0))
            leader = await hold_slot(a, "a story")
            call, text = await follow(b)
            draining = asyncio.create_task(stack.aclose())
            error = await fail(call)
            await draining
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "SHUTTING_DOWN"  # type: ignore[attr-defined]
        assert REPLY.startswith(text)
        a.model.open_gate()
        assert REPLY.endswith((await rest_of(leader))[0])
        assert prefills(a, b) == [1, 0]
