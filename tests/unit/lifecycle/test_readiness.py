"""The times of the readiness probes, in virtual time."""

import asyncio

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.lifecycle.readiness import Readiness


def test_probes_wait_for_an_idle_server() -> None:
    """No probe disturbs a client, however long clients are served; then there is one probe per idle interval."""
    probes: list[float] = []
    busy_until = 1000.0

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def probe() -> bool:
            probes.append(loop.time())
            return True

        readiness = Readiness(lambda serving: None, interval_seconds=60)
        running = asyncio.create_task(readiness.run(probe, idle=lambda: loop.time() >= busy_until))
        await asyncio.sleep(1100)
        readiness.record_outcome(succeeded=True)  # a client's generation
        await asyncio.sleep(59)
        assert len(probes) == 2
        running.cancel()

    run_virtual(main())
    assert probes[0] == pytest.approx(1000, abs=1)
    assert probes[1] == pytest.approx(probes[0] + 60)


@pytest.mark.parametrize("succeeds", [1, 2, 3, None])
def test_three_failed_probes_in_a_row_end_the_process(succeeds: int | None) -> None:
    """Probes run immediately, after 1 and after 2 more seconds, although clients fail all the time.

    A success before the third failure makes the server SERVING again; the next failure starts a new count.
    """
    probes: list[float] = []
    states: list[bool] = []

    async def main() -> None:
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

    run_virtual(main())
    assert probes == pytest.approx([1, 2, 4][:succeeds])
    assert states == [False] if succeeds is None else [False, True]


def test_a_probe_that_raises_has_failed() -> None:
    """Its exception does not end the probing: the next probe makes the server SERVING again."""
    probes: list[float] = []
    states: list[bool] = []

    async def main() -> None:
        async def probe() -> bool:
            probes.append(asyncio.get_running_loop().time())
            if len(probes) < 3:
                raise RuntimeError("broken")
            return True

        readiness = Readiness(states.append, interval_seconds=60)
        running = asyncio.create_task(readiness.run(probe, idle=lambda: True))
        await asyncio.sleep(100)
        assert not running.done()
        running.cancel()

    run_virtual(main())
    assert states == [False, True]
