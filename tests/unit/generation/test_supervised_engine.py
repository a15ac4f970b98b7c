"""The supervision of engine steps, in virtual time."""

import asyncio
import random
from types import SimpleNamespace
from typing import cast

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import Sequence, SequenceListener, SequenceResult
from llama2_server.errors import EngineUnavailable
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


def test_step_times_out_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has failed at the end of its wait, however start and timeout are rounded."""
    draw = random.Random(1)

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        monkeypatch.setattr(supervised_engine, "time", SimpleNamespace(monotonic=clock))
        for _ in range(200):
            await asyncio.sleep(draw.expovariate(0.1))
            engine = SimpleNamespace(alive=True, step_started_at=clock())
            seconds = draw.uniform(0.1, 60)
            await SupervisedEngine(cast(Engine, engine), engine_step_timeout_seconds=seconds).wait_until_failed()
            assert clock() - engine.step_started_at == pytest.approx(seconds, abs=1e-9)

    run_virtual(main())


def test_result_of_an_engine_whose_thread_died() -> None:
    """Without anything that watches the engine, as in the warm-up, a result that cannot come is an error."""

    async def main() -> None:
        engine = SimpleNamespace(alive=False, stopped=True, step_started_at=None)
        supervised = SupervisedEngine(cast(Engine, engine), engine_step_timeout_seconds=60)
        sequence = Sequence([1], GenerationParams(max_tokens=1), cast(SequenceListener, None))
        finished: asyncio.Future[SequenceResult] = asyncio.get_running_loop().create_future()
        with pytest.raises(EngineUnavailable):
            await supervised.result(sequence, finished)
        assert supervised.failed

    run_virtual(main())


@pytest.mark.parametrize("failed", [False, True])
def test_a_failed_engine_is_not_waited_for(failed: bool) -> None:
    """Its thread may never end; the one of another engine gets the time."""
    limits: list[float] = []

    def close(seconds: float) -> bool:
        limits.append(seconds)
        return True

    async def main() -> None:
        engine = SimpleNamespace(alive=True, step_started_at=None, close=close)
        supervised = SupervisedEngine(cast(Engine, engine), engine_step_timeout_seconds=60)
        if failed:
            supervised.fail("a reason")
        await supervised.close(5)

    asyncio.run(main())
    assert limits == [0 if failed else 5]


@pytest.mark.parametrize(("timeout_seconds", "messages"), [(0, 0), (0.5, 1)])
def test_a_step_that_outlasts_the_timeout_is_logged(
    caplog: pytest.LogCaptureFixture, timeout_seconds: float, messages: int
) -> None:
    """The engine has failed then; without a timeout nothing was waited for."""

    async def main() -> None:
        engine = SimpleNamespace(alive=True, step_started_at=None, close=lambda seconds: False)
        supervised = SupervisedEngine(cast(Engine, engine), engine_step_timeout_seconds=60)
        await supervised.close(timeout_seconds)
        assert supervised.failed

    asyncio.run(main())
    assert len(caplog.messages) == messages
