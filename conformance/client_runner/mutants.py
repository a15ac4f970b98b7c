"""Clients with one wrong behavior each, which the cases must find."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from conformance.client_runner import receiving, sending
from conformance.client_runner.cases import load_client_cases
from conformance.client_runner.reference import ReferenceClient
from conformance.client_runner.run import run_client_cases

MODULES = (sending, receiving)


@asynccontextmanager
async def _running(kind: type[ReferenceClient], address: str) -> AsyncIterator[ReferenceClient]:
    client = kind(address)
    try:
        yield client
    finally:
        await client.channel.close()


async def failed_client_cases(name: str, cases: Collection[str]) -> list[str]:
    """Run the named cases against a mutant, or against the correct client without a name; return the failed ones."""
    kind = client_mutants()[name] if name else ReferenceClient
    selected = [case for case in load_client_cases() if case.name in cases]
    results = await run_client_cases(lambda address: _running(kind, address), selected)
    return [result.case.name.removeprefix("client/") for result in results if not result.ok]


def client_mutants() -> dict[str, type[ReferenceClient]]:
    """Return the mutants by name."""
    found = [value for module in MODULES for value in vars(module).values() if isinstance(value, type)]
    return {kind.__name__: kind for kind in found if issubclass(kind, ReferenceClient) and kind is not ReferenceClient}
