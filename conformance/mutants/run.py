"""Run the cases against mutants: each mutant must be killed by the cases that `kills.json` names."""

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from conformance.mutants.behavior import MUTANTS, Mutant, ProxyKeys
from conformance.mutants.http_proxy import HttpProxy, running_http_proxy
from conformance.mutants.proxy import Proxy, running_proxy
from conformance.mutants.wrong import accounts, errors, flow, http, idempotency, receipts, replies, requests, services
from conformance.server_runner.run import run_case
from conformance.server_runner.suite import StoredCase
from conformance.server_runner.target import Keys, Target
from conformance.service.launch import running_envoy, running_service

KILLS = Path(__file__).parent / "kills.json"
REGISTERED = (
    accounts,
    errors,
    flow,
    http,
    idempotency,
    receipts,
    replies,
    requests,
    services,
)  # their imports fill MUTANTS
MAX_KILLS = 15
LIMITED, QUOTA = "free_calls", "quota"
FLAG = "--max-free-calls-per-minute"
MAX_FREE_CALLS, MAX_LIMITED_CALLS = 10**9, 60
"""One server serves the invalid requests of all mutants; another one serves the cases of the limit."""


def read_kills() -> dict[str, list[str]]:
    """Return the cases that must fail, by mutant."""
    kills: dict[str, list[str]] = json.loads(KILLS.read_text())
    return kills


@dataclass(slots=True)
class _Lane:
    """A correct server behind a proxy."""

    proxy: Proxy
    http_proxy: HttpProxy | None
    """In front of Envoy, if the cases need it."""
    targets: dict[tuple[tuple[str, int], ...], Target]
    """The connections to the proxy, by the options of the server."""


class Workbench:
    """Correct servers, one of them behind Envoy, and proxies in front of them."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._lanes: dict[str, _Lane] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for lane in self._lanes.values():
            lane.proxy.use(None)
            for target in lane.targets.values():
                await target.close()
        await self._stack.aclose()
        for lane in self._lanes.values():
            await lane.proxy.close()

    async def _lane(self, name: str) -> _Lane:
        """Return a lane; its server starts with the first case that needs it."""
        if name not in self._lanes:
            self._lanes[name] = await self._open_lane(limited=name == LIMITED)
        return self._lanes[name]

    async def _open_lane(self, *, limited: bool) -> _Lane:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        flags = (FLAG, str(MAX_LIMITED_CALLS if limited else MAX_FREE_CALLS))
        service = await self._stack.enter_async_context(running_service(folder, *flags))
        keys = Keys.read(service.keys_file, None)
        proxy = Proxy(service.address, ProxyKeys.of(keys))
        address = await self._stack.enter_async_context(running_proxy(proxy))
        http_proxy, url = (None, None) if limited else await self._open_http(folder, address)
        targets: dict[tuple[tuple[str, int], ...], Target] = {(): Target.connect(address, keys, url)}
        for options in {mutant.server_options for mutant in MUTANTS.values()} - {()}:
            other = await self._stack.enter_async_context(running_proxy(proxy, *options))
            targets[options] = Target.connect(other, keys, url)
        return _Lane(proxy, http_proxy, targets)

    async def _open_http(self, folder: Path, address: str) -> tuple[HttpProxy, str]:
        proxy = HttpProxy(await self._stack.enter_async_context(running_envoy(folder, address)))
        return proxy, await self._stack.enter_async_context(running_http_proxy(proxy))

    async def failed(self, mutant: Mutant | None, case: StoredCase) -> list[str]:
        """Run a case against a mutant, or against the proxies alone, and return the differences."""
        lane = await self._lane(_lane_name(case))
        lane.proxy.use(mutant)
        if lane.http_proxy is not None:
            lane.http_proxy.mutant = mutant
        try:
            return await run_case(lane.targets[mutant.server_options if mutant else ()], case)
        finally:
            await lane.proxy.stop_draining()


def _lane_name(case: StoredCase) -> str:
    """Return the name of the server for a case.

    A call that the quota rejects is told to return a minute later, and then has space in the queue for some seconds.
    The cases of the queue need all of its space, also those of the next mutant.
    """
    if case.profile == LIMITED:
        return LIMITED
    uses_quota = case.profile == QUOTA or any(step.get("key") == QUOTA for step in case.document["steps"])
    return QUOTA if uses_quota else ""


async def run_mutants(
    cases: Sequence[StoredCase],
    wanted: Mapping[str, Sequence[str]],
    on_mutant: Callable[[str, list[str]], None],
    *,
    workers: int = 2,
) -> dict[str, list[str]]:
    """Run the wanted cases against each mutant, on several servers side by side, and return the failed cases.

    A case that is not one of the mutant's in `kills.json` has to fail twice.

    Args:
        cases: all cases.
        wanted: the names of the cases to run, by mutant; an empty name is the proxy without a mutant.
        on_mutant: is called with each mutant and the cases that failed.
        workers: the number of servers.
    """
    by_name, kills = {case.name: case for case in cases}, read_kills()
    queue, found = list(wanted.items()), dict[str, list[str]]()

    async def fails(bench: Workbench, name: str, mutant: Mutant | None, case: str) -> bool:
        if not await bench.failed(mutant, by_name[case]):
            return False
        # On a busy machine, a case that needs time can fail without the mutant.
        return case in kills.get(name, ()) or bool(await bench.failed(mutant, by_name[case]))

    async def work() -> None:
        async with Workbench() as bench:
            while queue:
                name, names = queue.pop(0)
                mutant = MUTANTS[name] if name else None
                found[name] = [one for one in names if await fails(bench, name, mutant, one)]
                on_mutant(name, found[name])

    await asyncio.gather(*(work() for _ in range(workers)))
    return found
