"""The local database survives its process, full disks and torn writes."""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from tests.integration.usage.conftest import (
    COSTS,
    RECOVERY_TIMEOUT_SECONDS,
    LedgerOpener,
    crash,
    fill,
    locked,
    stored,
)
from tests.integration.usage.expected_records import FINISHED, Expected, check_all, record_request, until_writable

from llama2_server.errors import UsageUnavailable
from llama2_server.usage.ledger import PROGRESS_TOKENS, Ledger
from llama2_server.usage.pricing import TokenUsage, neurons
from llama2_server.usage.records import INTERRUPTED, UsageRecord


async def records(directory: Path) -> dict[str, UsageRecord]:
    """Return the records of a data directory by request id."""
    return {record.request_id: record for record in await stored(None, directory)}


async def test_killed_server_leaves_records_and_interrupted_requests(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """Finished requests keep their records; running requests are INTERRUPTED, at the prices of their admission."""
    ledger = await open_ledger()
    for name in ("runs", "waits"):
        await ledger.admit(name, "acme", "model")
    ledger.progress("runs", TokenUsage(9, 1))
    ledger.progress("runs", TokenUsage(9, 40))
    await record_request(ledger, "finished")
    await crash(ledger)
    await (await open_ledger(neuron_costs={})).close()
    found = await records(tmp_path)
    assert {name: record.outcome for name, record in found.items()} == {
        "finished": "MAX_TOKENS",
        "runs": INTERRUPTED,
        "waits": INTERRUPTED,
    }
    assert (found["runs"].input_tokens, found["runs"].output_tokens) == (9, 40)
    assert found["runs"].neurons == neurons(TokenUsage(9, 40), COSTS)
    assert found["runs"].finished_at > found["runs"].started_at
    assert found["waits"].neurons == found["waits"].output_tokens == 0


async def test_loss_is_bounded(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """Of the tokens that were reported, fewer than PROGRESS_TOKENS are missing after a crash, and no input token."""
    for computed in range(1, 3 * PROGRESS_TOKENS):
        ledger = await open_ledger()
        await ledger.admit(f"{computed}", "acme", "model")
        for token in range(1, computed + 1):
            ledger.progress(f"{computed}", TokenUsage(100, token))
        await ledger.commit()
        await crash(ledger)
    await (await open_ledger()).close()
    for name, record in (await records(tmp_path)).items():
        assert record.input_tokens == 100
        assert int(name) - PROGRESS_TOKENS < record.output_tokens <= int(name)


KILLED = """
import asyncio, os, signal, sys
from decimal import Decimal
from pathlib import Path
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage

async def main(directory):
    costs = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.000000001")}
    ledger = await Ledger.open(data_directory=Path(directory), neuron_costs=costs)
    for number in range(20):
        await ledger.admit(f"{number}", "acme", "model")
        ledger.finish(f"{number}", "MAX_TOKENS", TokenUsage(3, 5))
        await ledger.commit()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
def killed_directory(tmp_path: Path) -> Path:
    """A data directory whose server recorded 20 requests, and then got SIGKILL."""
    directory = tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(directory)], check=False)
    assert killed.returncode == -signal.SIGKILL
    return directory


async def test_sigkill_after_a_commit_loses_nothing(killed_directory: Path, open_ledger: LedgerOpener) -> None:
    """Each request whose commit returned has its record."""
    await (await open_ledger(data_directory=killed_directory)).close()
    check_all(await stored(None, killed_directory), {f"{number}": FINISHED for number in range(20)})


@pytest.mark.parametrize("cut", [1, 100, 4096, 5000, 30000])
async def test_torn_write(killed_directory: Path, open_ledger: LedgerOpener, cut: int) -> None:
    """If the end of the log is missing, the transactions before it count, and the database takes new records."""
    log = killed_directory / "usage.db-wal"
    os.truncate(log, log.stat().st_size - cut)
    await check_start_of(killed_directory, open_ledger, at_least=18 if cut < 5000 else 1)


async def test_damaged_byte(killed_directory: Path, open_ledger: LedgerOpener) -> None:
    """A damaged byte of the log is detected by its checksum; the transactions before it count."""
    log = killed_directory / "usage.db-wal"
    content = bytearray(log.read_bytes())
    content[-2000] ^= 1
    log.write_bytes(content)
    await check_start_of(killed_directory, open_ledger, at_least=18)


async def check_start_of(directory: Path, open_ledger: LedgerOpener, at_least: int) -> None:
    """Check that the first requests have exact records, at most one more is INTERRUPTED, and a new one is recorded."""
    ledger = await open_ledger(data_directory=directory)
    await record_request(ledger, "new")
    await ledger.close()
    found = await stored(None, directory)
    finished = sum(record.outcome != INTERRUPTED for record in found) - 1
    assert at_least <= finished < 20
    expected = {f"{number}": FINISHED for number in range(finished)} | {"new": FINISHED}
    if len(found) > len(expected):
        expected[f"{finished}"] = Expected("acme")
    check_all(found, expected)


async def test_commits_are_synced_each_second(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """Each second, a checkpoint copies the commits to the file, and syncs it before the log is used again."""
    ledger = await open_ledger()
    await record_request(ledger, "one")
    await ledger.probe_disk()  # does what the thread does each second
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / "usage.db", copy)  # without the log
    assert list(await records(copy)) == ["one"]
    assert ledger._local.database.connection.execute("PRAGMA synchronous").fetchone() == (1,)  # NORMAL


async def test_an_idle_server_does_not_use_the_disk(
    tmp_path: Path, open_ledger: LedgerOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without new commits there is nothing to sync."""
    ledger = await open_ledger()
    await record_request(ledger, "one")
    await ledger.probe_disk()  # does what the thread does each second
    checkpoints: list[None] = []
    monkeypatch.setattr(ledger._local.database, "checkpoint", lambda: checkpoints.append(None))
    await ledger.probe_disk()
    assert checkpoints == []
    await record_request(ledger, "two")
    await ledger.probe_disk()
    assert checkpoints == [None]


async def test_crash_after_recovery_loses_nothing(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """Records that one server recovers and another one recovers again are there once."""
    ledger = await open_ledger()
    await ledger.admit("one", "acme", "model")
    for number in range(3):
        await crash(ledger)
        ledger = await open_ledger()
        await record_request(ledger, f"life {number}")
    await ledger.close()
    expected = {f"life {number}": FINISHED for number in range(3)} | {"one": Expected("acme")}
    check_all(await stored(None, tmp_path), expected)
    assert list((tmp_path / "usage-locks").iterdir()) == []


async def test_requests_of_a_running_server_are_not_ended(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """A second server in the same directory does not end the requests of a running one."""
    first = await open_ledger()
    await first.admit("of the first", "acme", "model")
    second = await open_ledger()
    assert await records(tmp_path) == {}
    await second.close()
    first.finish("of the first", "MAX_TOKENS", TokenUsage(3, 5))
    await first.close()
    check_all(await stored(None, tmp_path), {"of the first": FINISHED})


async def test_request_that_was_ended_too_early_is_corrected(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """If a server's lock file is deleted, another one ends its requests; their own ends replace these records."""
    first = await open_ledger()
    await first.admit("one", "acme", "model")
    for lock in (tmp_path / "usage-locks").iterdir():
        lock.unlink()
    second = await open_ledger()
    check_all(await stored(None, tmp_path), {"one": Expected("acme")})
    first.finish("one", "MAX_TOKENS", TokenUsage(3, 5))
    await first.commit()
    check_all(await stored(None, tmp_path), {"one": FINISHED})
    assert [total.requests for total in await second.totals("acme")] == [1]


async def test_second_end_is_ignored(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """A request has one record, even after a second end or progress after its end."""
    ledger = await open_ledger()
    await record_request(ledger, "one")
    assert ledger.finish("one", "CANCELLED", TokenUsage(3, 5)) is None
    ledger.progress("one", TokenUsage(3, 500))
    await ledger.close()
    check_all(await stored(None, tmp_path), {"one": FINISHED})
    [record] = (await records(tmp_path)).values()
    assert timedelta(0) <= record.finished_at - record.started_at < timedelta(minutes=1)


async def reject_until_full(ledger: Ledger, filler: Path) -> int:
    """Fill the disk and record requests until one is rejected; return the number of recorded requests."""
    recorded = 0
    while True:
        fill(filler)
        try:
            await record_request(ledger, f"{recorded}")
        except UsageUnavailable:
            return recorded
        recorded += 1


async def test_full_disk(small_disk: Path, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture) -> None:
    """New requests are rejected, and the ends of running ones wait in memory, until the disk has space again."""
    ledger = await open_ledger(data_directory=small_disk)
    running = [f"running {number}" for number in range(20)]
    for name in running:
        await ledger.admit(name, "acme", "model")
    recorded = await reject_until_full(ledger, small_disk / "filler")
    for name in running:
        ledger.finish(name, "MAX_TOKENS", TokenUsage(3, 5))
    await ledger.commit()  # does not wait for the disk
    with pytest.raises(UsageUnavailable):
        ledger.check_capacity()
    with pytest.raises(UsageUnavailable):
        await ledger.admit("rejected", "acme", "model")
    with pytest.raises(UsageUnavailable):  # the totals would be too low
        await asyncio.wait_for(ledger.totals("acme"), RECOVERY_TIMEOUT_SECONDS)
    assert ledger.pending >= len(running)
    assert [one.message for one in caplog.records if "not writable" in one.message] == [
        "the usage database is not writable: database or disk is full"
    ]
    (small_disk / "filler").unlink()
    await until_writable(ledger)
    await record_request(ledger, "after")
    await ledger.close()
    names = [*running, *(f"{number}" for number in range(recorded)), "after"]
    found = {record.request_id: record for record in await stored(None, small_disk)}
    check_all([record for name, record in found.items() if name in names], dict.fromkeys(names, FINISHED))
    assert found.keys() - set(names) <= {f"{recorded}"}  # the request that found the disk full


async def test_lock_of_another_process(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """While another process locks the database, ends wait in memory and new requests are rejected; none is lost."""
    ledger = await open_ledger()
    await ledger.admit("long", "acme", "model")
    with locked(tmp_path / "usage.db"):
        ledger.finish("long", "MAX_TOKENS", TokenUsage(3, 5))
        await ledger.commit()
        assert not ledger.disk_writable
        with pytest.raises(UsageUnavailable):
            ledger.check_capacity()
    await until_writable(ledger)
    await record_request(ledger, "after")
    await ledger.close()
    check_all(await stored(None, tmp_path), {"long": FINISHED, "after": FINISHED})


async def test_failed_change_fails_alone(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """A change that the database cannot store, such as a broken Unicode text, fails without those around it."""
    ledger = await open_ledger()
    admissions = [
        ledger.admit(name, account, "model") for name, account in (("a", "acme"), ("b", "\ud800"), ("c", "acme"))
    ]
    results = await asyncio.gather(*admissions, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), UnicodeEncodeError, type(None)]
    for name in ("a", "c"):
        ledger.finish(name, "MAX_TOKENS", TokenUsage(3, 5))
    await ledger.close()
    check_all(await stored(None, tmp_path), {"a": FINISHED, "c": FINISHED})


async def test_log_stays_small(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """Checkpoints let the log start again, so that it does not grow with the number of records."""
    ledger = await open_ledger()
    sizes = []
    for round_number in range(4):
        for number in range(200):
            await record_request(ledger, f"{round_number}.{number}")
        await ledger.probe_disk()
        sizes.append((tmp_path / "usage.db-wal").stat().st_size)
    assert sizes[-1] <= 1.5 * sizes[0]
    files = list(tmp_path.glob("usage.db*"))
    assert len(files) == 3
    assert ledger.database_bytes == sum(path.stat().st_size for path in files)
    with sqlite3.connect(tmp_path / "usage.db") as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
