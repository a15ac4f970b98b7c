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

from conformance.mutants.behavior import MUTANTS, Mutant
from conformance.mutants.http_proxy import HttpProxy, running_http_proxy
from conformance.mutants.proxy import Proxy, running_proxy
from conformance.mutants.wrong import errors, flow, http, replies, requests, services
from conformance.server_runner.run import run_case
from conformance.server_runner.suite import StoredCase
from conformance.server_runner.target import Keys, Target
from conformance.service.launch import running_envoy, running_service

KILLS = Path(__file__).parent / "kills.json"
REGISTERED = (errors, flow, http, replies, requests, services)  # their imports fill MUTANTS
MAX_KILLS = 15
FLAGS = ("--max-free-calls-per-minute", str(10**9))
"""One server serves the invalid requests of all mutants."""


def read_kills() -> dict[str, list[str]]:
    """Return the cases that must fail, by mutant."""
    kills: dict[str, list[str]] = json.loads(KILLS.read_text())
    return kills


@dataclass(slots=True)
class Workbench:
    """One correct server behind Envoy, and proxies in front of both."""

    _proxy: Proxy
    _http_proxy: HttpProxy
    _targets: dict[tuple[tuple[str, int], ...], Target]
    _stack: AsyncExitStack

    @classmethod
    async def open(cls) -> Self:
        """Start the server and the proxies."""
        stack = AsyncExitStack()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        service = await stack.enter_async_context(running_service(folder, *FLAGS))
        keys = Keys.read(service.keys_file, None)
        proxy = Proxy(service.address, keys.roles)
        address = await stack.enter_async_context(running_proxy(proxy))
        envoy = await stack.enter_async_context(running_envoy(folder, address))
        http_proxy = HttpProxy(envoy)
        url = await stack.enter_async_context(running_http_proxy(http_proxy))
        targets: dict[tuple[tuple[str, int], ...], Target] = {(): Target.connect(address, keys, url)}
        for options in {mutant.server_options for mutant in MUTANTS.values()} - {()}:
            other = await stack.enter_async_context(running_proxy(proxy, *options))
            targets[options] = Target.connect(other, keys, url)
        return cls(proxy, http_proxy, targets, stack)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._proxy.use(None)
        for target in self._targets.values():
            await target.close()
        await self._stack.aclose()
        await self._proxy.close()

    async def failed(self, mutant: Mutant | None, case: StoredCase) -> list[str]:
        """Run a case against a mutant, or against the proxies alone, and return the differences."""
        self._proxy.use(mutant)
        self._http_proxy.mutant = mutant
        try:
            return await run_case(self._targets[mutant.server_options if mutant else ()], case)
        finally:
            await self._proxy.stop_draining()


async def run_mutants(
    cases: Sequence[StoredCase],
    wanted: Mapping[str, Sequence[str]],
    on_mutant: Callable[[str, list[str]], None],
    *,
    workers: int = 2,
) -> dict[str, list[str]]:
    """Run the wanted cases against each mutant, on several servers side by side, and return the failed cases.

    Args:
        cases: all cases.
        wanted: the names of the cases to run, by mutant; an empty name is the proxy without a mutant.
        on_mutant: is called with each mutant and the cases that failed.
        workers: the number of servers.
    """
    by_name = {case.name: case for case in cases}
    queue, found = list(wanted.items()), dict[str, list[str]]()

    async def work() -> None:
        async with await Workbench.open() as bench:
            while queue:
                name, names = queue.pop(0)
                mutant = MUTANTS[name] if name else None
                found[name] = [one for one in names if await bench.failed(mutant, by_name[one])]
                on_mutant(name, found[name])

    await asyncio.gather(*(work() for _ in range(workers)))
    return found
