"""The journal survives its process, stays within its limit, and ignores damaged lines."""

import errno
import os
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from tests.integration.usage.conftest import COSTS

from llama2_server.errors import UsageJournalFull
from llama2_server.usage.journal.encoding import Progress, decode, encode
from llama2_server.usage.journal.journal import PROGRESS_TOKENS, Journal
from llama2_server.usage.pricing import TokenUsage, neurons
from llama2_server.usage.records import INTERRUPTED, RunningRequest, UsageRecord

START = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
LIMIT = 64 * 1024


def running(request_id: str, account: str = "acme") -> RunningRequest:
    return RunningRequest(request_id, account, "model", START, COSTS)


def finish(journal: Journal, request_id: str, outcome: str = "MAX_TOKENS") -> None:
    journal.finish(request_id, outcome, TokenUsage(3, 5), START + timedelta(seconds=1), cached=False)


def crash_and_reopen(journal: Journal, directory: Path, limit_bytes: int = LIMIT) -> Journal:
    journal._segments.release(remove=False)
    return Journal.open(directory, limit_bytes)


def files(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def admit_until_full(journal: Journal, run_at_once: int) -> int:
    """Admit and finish requests until the journal is full, except the last `run_at_once`; return their number."""
    for number in count():
        try:
            journal.admit(running(f"{number}"))
        except UsageJournalFull:
            return number
        if number >= run_at_once:
            finish(journal, f"{number - run_at_once}")
    raise AssertionError


def ids(journal: Journal) -> list[str]:
    return [record.request_id for record in journal.oldest(1000)]


@pytest.mark.parametrize("account", ["acme", 'quote " and \n break', "münchen 🦙"])
def test_entries_are_decoded_as_encoded(account: str) -> None:
    """Every kind of entry is encoded as one line, and decoded without a change."""
    request = running("one", account)
    record = request.finish("CANCELLED", TokenUsage(7, 11), START, cached=False)
    for entry in (request, Progress("one", TokenUsage(7, 3)), record):
        line = encode(entry)
        assert line.count(b"\n") == 1
        assert decode(line) == entry


def test_killed_server_leaves_records_and_interrupted_requests(tmp_path: Path) -> None:
    """Finished requests keep their records; running requests are INTERRUPTED, at the prices of their admission."""
    journal = Journal.open(tmp_path, LIMIT)
    for name in ("finished", "runs", "waits"):
        journal.admit(running(name))
    journal.progress("runs", TokenUsage(9, 1))
    journal.progress("runs", TokenUsage(9, 40))
    finish(journal, "finished")
    journal = crash_and_reopen(journal, tmp_path)
    records = {record.request_id: record for record in journal.oldest(10)}
    assert journal.pending == len(records) == 3
    assert records["finished"].outcome == "MAX_TOKENS"
    assert (records["runs"].outcome, records["waits"].outcome) == (INTERRUPTED, INTERRUPTED)
    assert (records["runs"].input_tokens, records["runs"].output_tokens) == (9, 40)
    assert records["runs"].neurons == neurons(TokenUsage(9, 40), COSTS)
    assert records["runs"].finished_at > records["runs"].started_at
    assert records["waits"].neurons == records["waits"].output_tokens == 0
    journal.release()


def test_loss_is_bounded(tmp_path: Path) -> None:
    """At any time, a crash loses fewer than PROGRESS_TOKENS output tokens, and no input token."""
    for computed in range(1, 3 * PROGRESS_TOKENS):
        journal = Journal.open(tmp_path, LIMIT)
        journal.admit(running("one"))
        for token in range(1, computed + 1):
            journal.progress("one", TokenUsage(100, token))
        journal = crash_and_reopen(journal, tmp_path)
        [record] = journal.oldest(2)
        assert record.input_tokens == 100
        assert computed - PROGRESS_TOKENS < record.output_tokens <= computed
        journal.settle(1)
        journal.release()


@pytest.mark.parametrize("cut", [1, 2, 9, 30])
def test_incomplete_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    """An incomplete last line after a crash is ignored; all lines before it count."""
    journal = Journal.open(tmp_path, LIMIT)
    for name in ("one", "two"):
        journal.admit(running(name))
        finish(journal, name)
    path = journal._segments.current.path
    os.truncate(path, path.stat().st_size - cut)
    journal = crash_and_reopen(journal, tmp_path)
    assert [(record.request_id, record.outcome) for record in journal.oldest(10)] == [
        ("one", "MAX_TOKENS"),
        ("two", INTERRUPTED),
    ]
    journal.release()


def test_damaged_byte_loses_one_line(tmp_path: Path) -> None:
    """The checksum of a line detects a damaged byte; the other lines count."""
    journal = Journal.open(tmp_path, LIMIT)
    for name in ("one", "two", "three"):
        journal.admit(running(name))
        finish(journal, name)
    path = journal._segments.current.path
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"MAX_TOKENS", b"MAX_TOKEMS")
    path.write_bytes(b"".join(lines))
    journal = crash_and_reopen(journal, tmp_path)
    assert {record.request_id: record.outcome for record in journal.oldest(10)} == {
        "one": "MAX_TOKENS",
        "two": INTERRUPTED,
        "three": "MAX_TOKENS",
    }
    journal.release()


def test_full_journal_rejects_and_recovers(tmp_path: Path) -> None:
    """The size stays within the limit, every admitted request gets its record, and a settled journal admits again."""
    journal = Journal.open(tmp_path, LIMIT)
    admitted = admit_until_full(journal, run_at_once=5)
    for number in range(admitted - 5, admitted):
        journal.progress(f"{number}", TokenUsage(1, 2500))
        finish(journal, f"{number}")
    assert admitted > 50
    assert journal.size <= LIMIT
    assert journal.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert ids(journal) == [f"{number}" for number in range(admitted)]
    journal.settle(admitted)
    for number in range(50):
        journal.admit(running(f"again {number}"))
        finish(journal, f"again {number}")
    journal.release()


def test_files_without_unflushed_records_are_deleted(tmp_path: Path) -> None:
    """A long request does not keep the files of requests that finish in the meantime; a release leaves no file."""
    journal = Journal.open(tmp_path, LIMIT)
    journal.admit(running("long"))
    for number in range(2000):
        journal.admit(running(f"{number}"))
        finish(journal, f"{number}")
        journal.settle(1)
        if number % 400 == 0:
            journal.progress("long", TokenUsage(7, number + 16))
    assert journal.size < LIMIT / 8
    journal = crash_and_reopen(journal, tmp_path)
    records = {record.request_id: record for record in journal.oldest(1000)}
    assert (records["long"].input_tokens, records["long"].output_tokens) == (7, 1616)
    journal.settle(journal.pending)
    journal.release()
    assert files(tmp_path) == []


def test_crash_after_recovery_loses_nothing(tmp_path: Path) -> None:
    """Records that one server recovers but does not settle are recovered by the next one, once."""
    journal = Journal.open(tmp_path, LIMIT)
    journal.admit(running("one"))
    for number in range(3):
        journal = crash_and_reopen(journal, tmp_path)
        journal.admit(running(f"life {number}"))
        finish(journal, f"life {number}")
    everything = sorted(ids(journal))
    settled = ids(journal)[0]
    journal.settle(1)
    journal = crash_and_reopen(journal, tmp_path)
    assert everything == ["life 0", "life 1", "life 2", "one"]
    assert sorted({*ids(journal), settled}) == everything
    assert journal.pending == len(set(ids(journal)))
    journal.settle(journal.pending)
    journal.release()
    assert files(tmp_path) == []


def test_journal_of_a_running_server_is_not_recovered(tmp_path: Path) -> None:
    """A second server in the same directory does not recover the journal of a running server."""
    first = Journal.open(tmp_path, LIMIT)
    first.admit(running("of the first"))
    second = Journal.open(tmp_path, LIMIT)
    assert second.pending == 0
    second.release()
    finish(first, "of the first")
    assert ids(first) == ["of the first"]
    first.settle(1)
    first.release()
    assert files(tmp_path) == []


def test_incomplete_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write rejects a new request, keeps a finished one in memory, and damages no later line."""
    journal = Journal.open(tmp_path, LIMIT)
    journal.admit(running("one"))
    journal.admit(running("two"))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(
            "llama2_server.usage.journal.segments.os.write", lambda file, data: write(file, data[: len(data) // 2])
        )
        with pytest.raises(UsageJournalFull):
            journal.admit(running("three"))
        finish(journal, "one")
    assert ids(journal) == ["one"]
    finish(journal, "two")
    journal = crash_and_reopen(journal, tmp_path)
    assert {record.request_id: record.outcome for record in journal.oldest(10)} == {
        "one": INTERRUPTED,
        "two": "MAX_TOKENS",
    }
    journal.release()


def test_new_file_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a new file cannot be created, the old file stays in use."""

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal.open(tmp_path, LIMIT)
    with monkeypatch.context() as patch:
        patch.setattr("llama2_server.usage.journal.segments.os.open", fail)
        for number in range(50):
            journal.admit(running(f"{number}"))
            finish(journal, f"{number}")
    journal = crash_and_reopen(journal, tmp_path)
    assert ids(journal) == [f"{number}" for number in range(50)]
    journal.release()


def test_sync_reaches_every_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync syncs each written file once, including full files and the current one."""
    synced: list[int] = []
    monkeypatch.setattr(
        "llama2_server.usage.journal.segments.os.fsync", lambda file: synced.append(os.fstat(file).st_ino)
    )
    journal = Journal.open(tmp_path, LIMIT)
    for number in range(50):
        journal.admit(running(f"{number}"))
        finish(journal, f"{number}")
    journal.sync()
    assert set(synced) == {path.stat().st_ino for path in tmp_path.glob("*.journal")}
    assert len(synced) == len(set(synced)) > 2
    journal.sync()
    assert len(synced) == len(set(synced))
    journal.release()


def test_second_end_is_ignored(tmp_path: Path) -> None:
    """A request has one record, even after a second end or progress after its end."""
    journal = Journal.open(tmp_path, LIMIT)
    journal.admit(running("one"))
    finish(journal, "one", "MAX_TOKENS")
    finish(journal, "one", "CANCELLED")
    journal.progress("one", TokenUsage(3, 500))
    [record] = journal.oldest(10)
    assert record == UsageRecord(
        "one",
        "acme",
        "model",
        START,
        START + timedelta(seconds=1),
        3,
        5,
        False,
        neurons(TokenUsage(3, 5), COSTS),
        "MAX_TOKENS",
    )
    journal.release()
