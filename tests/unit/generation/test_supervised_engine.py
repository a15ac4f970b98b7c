"""The supervision of engine steps, in virtual time."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.engine.engine import Engine
from llama2_server.generation import supervised_engine
from llama2_server.generation.supervised_engine import SupervisedEngine


def test_slow_generation_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation may take much longer than the step timeout, which applies to each step alone."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        monkeypatch.setattr(supervised_engine, "time", SimpleNamespace(monotonic=clock))
        engine = SimpleNamespace(alive=True, step_started_at=None)
        supervised = SupervisedEngine(cast(Engine, engine), engine_step_timeout_seconds=0.5)
        failing = asyncio.create_task(supervised.wait_until_failed())
        for _ in range(20):
            engine.step_started_at = clock()
            await asyncio.sleep(0.375)
        assert not supervised.failed
        await failing  # the last step does not end
        assert clock() == engine.step_started_at + 0.5

    run_virtual(main())
