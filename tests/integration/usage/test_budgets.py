"""Spent and reserved neurons never exceed an account's budget, whatever happens to the requests and the servers."""

import asyncio
import random
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from tests.integration.usage.conftest import RECOVERY_TIMEOUT_SECONDS, LedgerOpener, crash, stored, until_up
from tests.support.servers.postgres_server import PostgresCluster

from llama2_server.errors import BudgetExhausted, QueueFull, UsageUnavailable
from llama2_server.usage.budgets import budget
from llama2_server.usage.budgets import statements as budget_statements
from llama2_server.usage.errors import StoreUnavailable
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage, neurons

COSTS = {"input_tokens": Decimal("0.5"), "output_tokens": Decimal("0.25")}
MOST = TokenUsage(10, 20)  # 10 neurons
RACING = 64


def budgets(**by_account: int) -> budget.BudgetOf:
    """Return the budgets of some accounts; the others have none."""
    return lambda account_id: Decimal(by_account[account_id]) if account_id in by_account else None


async def admit(ledger: Ledger, request_id: str, account_id: str = "acme", most: TokenUsage = MOST) -> None:
    """Reserve the price of a request, and admit it."""
    async with ledger.reserved(request_id, account_id, "model", most):
        await ledger.admit(request_id, account_id, "model")


async def reject(ledger: Ledger, error: BaseException) -> None:
    """Reserve the price of a request that ends with the error before it is admitted."""
    async with ledger.reserved("displaced", "acme", "model", MOST):
        assert await used(ledger) == (0, 10)
        raise error


async def used(ledger: Ledger, account_id: str = "acme") -> tuple[float, float]:
    """Return the spent and the reserved neurons of this month."""
    state = await ledger.budget(account_id)
    assert state is not None
    assert state.use.spent + state.use.reserved <= state.neurons_per_month
    return float(state.use.spent), float(state.use.reserved)


async def settled(ledger: Ledger) -> tuple[float, float]:
    """Return the spent and the reserved neurons after the finished requests have their final records."""
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    return await used(ledger)


async def two_servers(tmp_path: Path, url: str | None, open_ledger: LedgerOpener, neurons: int) -> list[Ledger]:
    """Open the ledgers of two servers: on one data directory, or with their own ones and one store."""
    folders = [tmp_path / "one", tmp_path / ("one" if url is None else "two")]
    return [
        await open_ledger(url=url, data_directory=folder, neuron_costs=COSTS, budget_of=budgets(acme=neurons))
        for folder in folders
    ]


@pytest.mark.usefixtures("patient_stores")
async def test_racing_requests_stay_within_the_budget(
    tmp_path: Path, url: str | None, open_ledger: LedgerOpener
) -> None:
    """64 calls at once on two servers: exactly as many are admitted as fit, and the others leave no record."""
    ledgers = await two_servers(tmp_path, url, open_ledger, 175)

    async def try_one(number: int) -> str | None:
        try:
            await admit(ledgers[number % 2], f"{number}")
        except BudgetExhausted:
            return None
        return f"{number}"

    admitted = [one for one in await asyncio.gather(*map(try_one, range(RACING))) if one is not None]
    assert len(admitted) == 17
    assert await used(ledgers[0]) == (0, 170)
    for request_id in admitted:
        ledgers[int(request_id) % 2].finish(request_id, "MAX_TOKENS", MOST)
    for ledger in ledgers:
        await settled(ledger)  # the other server may still have records
    assert await used(ledgers[0]) == (170, 0)
    records = await stored(url, tmp_path / "one")
    assert sorted(record.request_id for record in records) == sorted(admitted)


@pytest.mark.usefixtures("patient_stores")
async def test_spent_and_reserved_never_exceed_the_budget(
    tmp_path: Path, url: str | None, open_ledger: LedgerOpener
) -> None:
    """64 clients that repeat, finish early, fail and are rejected: the sum is checked in between; the end is exact."""
    ledgers = await two_servers(tmp_path, url, open_ledger, 300)
    draw, spent, rejected = random.Random(7), Decimal(0), 0

    async def client(number: int) -> None:
        nonlocal spent, rejected
        ledger = ledgers[number % 2]
        for attempt in range(4):
            request_id = f"{number}.{attempt}"
            try:
                await admit(ledger, request_id)
            except BudgetExhausted:
                rejected += 1
                continue
            if attempt == 0:
                await used(ledger)
            tokens = TokenUsage(draw.choice([0, 10]), draw.randrange(21))
            spent += neurons(tokens, COSTS)
            ledger.finish(request_id, draw.choice(["MAX_TOKENS", "CANCELLED"]), tokens)

    await asyncio.gather(*(client(number) for number in range(RACING)))
    for ledger in ledgers:
        await settled(ledger)
    assert await used(ledgers[0]) == (float(spent), 0)
    assert rejected
    assert len(await stored(url, tmp_path / "one")) == 4 * RACING - rejected


async def test_difference_is_returned_at_the_end(url: str | None, open_ledger: LedgerOpener) -> None:
    """A request that costs less than its reservation leaves room for the next one; a cached reply costs nothing."""
    ledger = await open_ledger(url=url, neuron_costs=COSTS, budget_of=budgets(acme=12))
    await admit(ledger, "first")
    with pytest.raises(BudgetExhausted):
        await admit(ledger, "too much")
    ledger.finish("first", "END_OF_SEQUENCE", TokenUsage(2, 4))
    assert await settled(ledger) == (2, 0)
    await admit(ledger, "second")
    await ledger.admit("cached", "acme", "model")
    ledger.finish("cached", "END_OF_SEQUENCE", MOST, cached=True)
    ledger.finish("second", "MAX_TOKENS", MOST)
    assert await settled(ledger) == (12, 0)
    await admit(ledger, "other account", "other")
    assert await ledger.budget("other") is None


async def test_error_has_the_start_of_the_next_month(url: str | None, open_ledger: LedgerOpener) -> None:
    """RetryInfo is the time until the next month in UTC; then the account has its whole budget again."""
    now = datetime(2026, 12, 31, 23, 0, 0, tzinfo=UTC)
    ledger = await open_ledger(url=url, neuron_costs=COSTS, budget_of=budgets(acme=10), now=lambda: now)
    await admit(ledger, "december")
    with pytest.raises(BudgetExhausted) as rejected:
        await admit(ledger, "too much", most=TokenUsage(0, 1))
    assert str(rejected.value) == (
        "account acme has a budget of 10 neurons per month: 0 are spent, 10 are reserved for running requests, and "
        "this request can cost 0.25; lower max_tokens, or retry next month"
    )
    assert rejected.value.retry_after_seconds == 3600
    now = datetime(2027, 1, 1, tzinfo=UTC)
    await admit(ledger, "january")
    ledger.finish("december", "MAX_TOKENS", MOST)  # counts in December, in which it started
    assert await settled(ledger) == (0, 10)


@pytest.mark.usefixtures("patient_stores")
async def test_reservation_of_a_killed_server_becomes_its_record(
    tmp_path: Path, url: str | None, open_ledger: LedgerOpener
) -> None:
    """After a SIGKILL the reservation stays until the next start; then only the recorded tokens are spent."""
    options = {"url": url, "neuron_costs": COSTS, "budget_of": budgets(acme=15)}
    killed = await open_ledger(data_directory=tmp_path / "one", **options)
    await admit(killed, "running")
    killed.progress("running", TokenUsage(4, 0))
    await killed.commit()
    await crash(killed)
    if url is not None:
        other = await open_ledger(data_directory=tmp_path / "two", **options)
        assert await used(other) == (0, 10)
        with pytest.raises(BudgetExhausted):
            await admit(other, "elsewhere")
    restarted = await open_ledger(data_directory=tmp_path / "one", **options)
    assert await settled(restarted) == (2, 0)
    await admit(restarted, "next")


async def test_withdrawn_request_leaves_nothing(tmp_path: Path, url: str | None, open_ledger: LedgerOpener) -> None:
    """A request that the queue rejects after its reservation has neither a record nor a reservation."""
    ledger = await open_ledger(url=url, neuron_costs=COSTS, budget_of=budgets(acme=10))
    for error in (QueueFull("displaced", 1.0), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            await reject(ledger, error)
    assert await settled(ledger) == (0, 0)
    assert await stored(url, tmp_path) == []
    await admit(ledger, "next")


async def test_request_that_is_withdrawn_after_its_admission(
    tmp_path: Path, url: str | None, open_ledger: LedgerOpener
) -> None:
    """It has no record, and its reservation ends."""
    ledger = await open_ledger(url=url, neuron_costs=COSTS, budget_of=budgets(acme=10))
    async with ledger.reserved("rejected", "acme", "model", MOST):
        await ledger.admit("rejected", "acme", "model")
        ledger.withdraw("rejected")
    assert await settled(ledger) == (0, 0)
    assert await stored(url, tmp_path) == []
    await admit(ledger, "next")


async def test_budget_needs_the_store(
    tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """While PostgreSQL does not answer, calls of accounts with a budget are rejected, and only these. It is logged."""
    url = postgres.new_database()
    ledger = await open_ledger(url=url, neuron_costs=COSTS, budget_of=budgets(acme=100))
    await asyncio.to_thread(postgres.stop)
    try:
        for request_id in ("first", "second"):
            with pytest.raises(UsageUnavailable):
                await admit(ledger, request_id)
        with pytest.raises(UsageUnavailable):
            await ledger.budget("acme")
        assert "the usage store is unavailable" in caplog.text
        await admit(ledger, "free", "other")
        await ledger.admit("cached", "acme", "model")
        for request_id in ("free", "cached"):
            ledger.finish(request_id, "MAX_TOKENS", MOST, cached=request_id == "cached")
    finally:
        await asyncio.to_thread(postgres.start)
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    assert ledger.store_up
    await admit(ledger, "later")
    assert await settled(ledger) == (0, 10)
    assert sorted(record.request_id for record in await stored(url)) == ["cached", "free"]


async def test_uncertain_reservation_ends_with_a_record(
    postgres: PostgresCluster, open_ledger: LedgerOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the answer to a reservation is lost, the rejected call has a record of 0 tokens, which ends it for certain."""
    url = postgres.new_database()
    ledger = await open_ledger(url=url, neuron_costs=COSTS, budget_of=budgets(acme=10))
    assert ledger._forwarder is not None
    store = ledger._forwarder._store
    reserve = store.reserve

    async def lose_the_answer(reservation: budget.Reservation) -> budget.BudgetUse | None:
        await reserve(reservation)
        error = StoreUnavailable("connection lost", temporary=True)
        error.uncertain = True
        raise error

    monkeypatch.setattr(store, "reserve", lose_the_answer)
    with pytest.raises(UsageUnavailable):
        await admit(ledger, "lost")
    monkeypatch.undo()
    assert await settled(ledger) == (0, 0)
    [record] = await stored(url)
    assert (record.request_id, record.outcome, record.neurons) == ("lost", "UNAVAILABLE", Decimal(0))


@pytest.mark.parametrize(("statement", "outcomes"), [("LOCK_ACCOUNT", []), ("INSERT", ["UNAVAILABLE"])])
async def test_connection_that_breaks_during_a_reservation(
    postgres: PostgresCluster,
    open_ledger: LedgerOpener,
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
    outcomes: list[str],
) -> None:
    """The call is rejected. It has a record only if the reservation may exist."""
    url = postgres.new_database()
    ledger = await open_ledger(url=url, neuron_costs=COSTS, budget_of=budgets(acme=10))
    with monkeypatch.context() as patch:
        patch.setattr(budget_statements, statement, "SELECT pg_terminate_backend(pg_backend_pid())")
        with pytest.raises(UsageUnavailable):
            await admit(ledger, "lost")
    await until_up(ledger)
    assert await settled(ledger) == (0, 0)
    assert [record.outcome for record in await stored(url)] == outcomes
    await admit(ledger, "next")
