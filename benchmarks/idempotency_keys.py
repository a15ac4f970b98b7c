"""Measure what an idempotency key adds to a call in the usage ledger: with SQLite, and with PostgreSQL.

Calls without and with a key alternate in one run, so that both meet the same disturbances. A call is everything that
the ledger does for it: claim, admission, record, and the wait until the record is durable.
Run `python -m benchmarks.idempotency_keys [--usage-url URL]`.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

from benchmarks.results import processor
from llama2_server.usage.keys.records import KeyRecord, KeyState
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage
from llama2_server.usage.store import Store

COSTS = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.3672")}
TOKENS = TokenUsage(20, 100)


async def without_key(ledger: Ledger) -> None:
    """Record a call."""
    request_id = uuid.uuid4().hex
    await ledger.admit(request_id, "account", "model")
    ledger.finish(request_id, "END_OF_SEQUENCE", TOKENS)
    await ledger.commit()


async def with_key(ledger: Ledger) -> None:
    """Claim a new key, and record its call."""
    request_id = uuid.uuid4().hex
    record = KeyRecord(
        digest=2 * request_id,
        request_id=request_id,
        instance=ledger.keys.instance,
        state=KeyState.CLAIMED,
        seed=1,
        fingerprint=2 * request_id,
        salt=request_id,
        field_digests=dict.fromkeys(("prompt", "max_tokens", "temperature"), 2 * request_id),
        expires_at=datetime.now(UTC) + timedelta(hours=24),
    )
    claim = await ledger.keys.claim(record, lambda _: None)
    opened = replace(record, state=KeyState.OPEN)
    await ledger.admit(request_id, "account", "model", ledger.keys.storing(opened))
    complete = replace(opened, state=KeyState.COMPLETE, completion=bytes(300), computations=1)
    ledger.finish(request_id, "END_OF_SEQUENCE", TOKENS, also=ledger.keys.storing(complete))
    await ledger.commit()
    await ledger.keys.end(claim, admitted=True)


async def round_trip(store: Store) -> None:
    """Make the smallest round trip to PostgreSQL, on the connection of the keys."""
    await store.keys.release("no key", "no server")


async def measure(calls: int, url: str | None) -> None:
    """Measure one ledger, and print the medians."""
    with tempfile.TemporaryDirectory() as folder:
        store = None if url is None else Store(url)
        ledger = await Ledger.open(data_directory=Path(folder), neuron_costs=COSTS, store=store)
        kinds: list[Callable[[], Awaitable[None]]] = [partial(without_key, ledger), partial(with_key, ledger)]
        if store is not None:
            kinds.append(partial(round_trip, store))
        seconds: list[list[float]] = [[] for _ in kinds]
        for number in range(calls + 20):
            for call, values in zip(kinds, seconds, strict=True):
                started_at = time.perf_counter()
                await call()
                if number >= 20:  # the first calls connect and prepare statements
                    values.append(time.perf_counter() - started_at)
        await ledger.close()
    without, with_, *trips = (1000 * statistics.median(values) for values in seconds)
    kind = "SQLite" if url is None else "PostgreSQL"
    print(
        f"{kind}, {calls} calls: {without:.2f} ms without a key, {with_:.2f} ms with a key, "
        f"{with_ - without:+.2f} ms" + "".join(f"; a round trip takes {trip:.2f} ms" for trip in trips)
    )


def main() -> None:
    """Measure SQLite, and with a URL also PostgreSQL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="number of calls of each kind")
    parser.add_argument("--usage-url", help="an empty database of PostgreSQL")
    arguments = parser.parse_args()
    print(processor())
    asyncio.run(measure(arguments.calls, None))
    if arguments.usage_url is not None:
        asyncio.run(measure(arguments.calls, arguments.usage_url))


if __name__ == "__main__":
    main()
