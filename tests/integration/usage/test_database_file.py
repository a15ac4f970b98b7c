"""The file of the local database: deleted, replaced, on a network file system, private."""

import errno
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from tests.integration.usage.conftest import LedgerOpener, stored
from tests.integration.usage.expected_records import FINISHED, check_all, record_request, until_writable

from llama2_server.errors import UsageUnavailable
from llama2_server.usage import migrations
from llama2_server.usage.errors import LedgerError
from llama2_server.usage.local import file_system
from llama2_server.usage.pricing import TokenUsage


def test_the_current_version_is_the_last_migration() -> None:
    """A database at this version is not migrated."""
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_heads() == [migrations.CURRENT_VERSION]


def delete_all(directory: Path) -> None:
    """Delete the database with its log."""
    for path in directory.glob("usage.db*"):
        path.unlink()


def replace_log(directory: Path) -> None:
    """Delete the database, and put the log of another one in its place."""
    delete_all(directory)
    other = directory.parent / "other.db"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE other (value)")
        shutil.copy(f"{other}-wal", directory / "usage.db-wal")


@pytest.mark.parametrize(
    "delete",
    [lambda directory: (directory / "usage.db").unlink(), delete_all, replace_log, shutil.rmtree],
    ids=["file", "log", "log of another file", "all"],
)
async def test_deleted_file_is_restored(
    tmp_path: Path, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture, delete: object
) -> None:
    """The file is deleted while the server runs: the next request restores it with all its records, 11 of 11."""
    assert callable(delete)
    directory = tmp_path / "data"
    ledger = await open_ledger(data_directory=directory)
    await ledger.admit("running", "acme", "model")
    for number in range(9):
        await record_request(ledger, f"{number}")
        if number == 4:
            delete(directory)
    ledger.finish("running", "MAX_TOKENS", TokenUsage(3, 5))
    await record_request(ledger, "last")
    assert "was deleted; it was restored with all its records" in caplog.text
    names = ["running", "last", *(f"{number}" for number in range(9))]
    check_all(await stored(None, directory), dict.fromkeys(names, FINISHED))  # another process sees them
    assert [total.requests for total in await ledger.totals("acme")] == [11]
    assert oct((directory / "usage.db").stat().st_mode & 0o777) == "0o600"
    await ledger.close()
    assert len(await stored(None, directory)) == 11
    assert sorted(path.name for path in directory.glob("usage.db*")) == ["usage.db"]


async def test_deleted_file_is_noticed_without_requests(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """Without requests, the file is back within a second."""
    ledger = await open_ledger()
    await record_request(ledger, "one")
    (tmp_path / "usage.db").unlink()
    await ledger.probe_disk()  # does what the thread does each second
    assert [record.request_id for record in await stored(None, tmp_path)] == ["one"]


async def test_replaced_file_rejects_requests(
    tmp_path: Path, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """Another file at the path is never overwritten: requests are rejected until it is gone, and none is lost."""
    ledger = await open_ledger()
    await ledger.admit("running", "acme", "model")
    await record_request(ledger, "before")
    delete_all(tmp_path)
    (tmp_path / "usage.db").write_text("a precious file")
    with pytest.raises(UsageUnavailable):
        await ledger.admit("rejected", "acme", "model")
    assert not ledger.disk_writable
    assert "is another file than the open usage database; move that file away" in caplog.text
    ledger.finish("running", "MAX_TOKENS", TokenUsage(3, 5))
    await ledger.commit()
    assert (tmp_path / "usage.db").read_text() == "a precious file"
    (tmp_path / "usage.db").rename(tmp_path / "moved")
    await ledger.probe_disk()
    assert ledger.disk_writable
    await record_request(ledger, "after")
    await ledger.close()
    check_all(await stored(None, tmp_path), dict.fromkeys(["running", "before", "after"], FINISHED))


async def test_replaced_file_at_the_end(
    tmp_path: Path, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that ends while another file is at the path leaves its records in a copy, which the log names."""
    ledger = await open_ledger()
    await record_request(ledger, "one")
    delete_all(tmp_path)
    (tmp_path / "usage.db").write_text("a precious file")
    await ledger.close()
    [copy] = tmp_path.glob("usage.db.*.copy")
    assert str(copy) in caplog.text
    (tmp_path / "restored").mkdir()
    copy.rename(tmp_path / "restored" / "usage.db")
    check_all(await stored(None, tmp_path / "restored"), {"one": FINISHED})


async def test_file_that_cannot_be_restored_rejects_requests(
    tmp_path: Path, open_ledger: LedgerOpener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a deleted file cannot be restored, requests are rejected until it can; none is lost."""

    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    ledger = await open_ledger()
    await record_request(ledger, "one")
    delete_all(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("llama2_server.usage.local.database.os.link", fail)
        with pytest.raises(UsageUnavailable):
            await ledger.admit("rejected", "acme", "model")
        assert not ledger.disk_writable
        assert "was deleted and cannot be restored" in caplog.text
    await until_writable(ledger)
    await record_request(ledger, "two")
    await ledger.close()
    check_all(await stored(None, tmp_path), dict.fromkeys(["one", "two"], FINISHED))


MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
36 21 0:33 / /srv/net\\040work rw,relatime shared:2 - {kind} server:/export rw
37 36 8:2 / /srv/net\\040work/local rw,relatime - xfs /dev/sdb rw
"""


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "ceph"])
async def test_network_file_system_is_refused(
    tmp_path: Path, open_ledger: LedgerOpener, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A data directory on a network file system is an error with the directory and the file system's type."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(kind=kind).replace("/srv", str(tmp_path)))
    monkeypatch.setattr(file_system, "MOUNTS", mounts)
    directory = tmp_path / "net work" / "data"
    message = f"^--data-directory: {directory} is on a network file system \\({kind}\\), .*; use a local disk$"
    with pytest.raises(LedgerError, match=message):
        await open_ledger(data_directory=directory)
    assert list(directory.iterdir()) == []
    for local in (tmp_path / "net work" / "local", tmp_path / "net works"):
        await (await open_ledger(data_directory=local)).close()


async def test_mounts_of_this_machine_are_read(tmp_path: Path) -> None:
    """The file system of a temporary directory is found, and is local."""
    if not file_system.MOUNTS.exists():
        pytest.skip("NOT TESTED: this system has no /proc")
    assert file_system.network_file_system(tmp_path) is None


async def test_records_of_an_older_version_are_not_lost(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """A journal of an older version with records prevents the start; the empty directory that it leaves does not."""
    journal = tmp_path / "journal"
    journal.mkdir()
    (journal / "0123.000000001.journal").write_bytes(b"00000000 []\n")
    with pytest.raises(LedgerError, match=r"journal has usage records of an older version; start that version once"):
        await open_ledger()
    (journal / "0123.000000001.journal").unlink()
    await (await open_ledger()).close()


async def test_files_are_private(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """The database and its other files can be read by their owner only, with the usual umask."""
    previous = os.umask(0o022)
    try:
        await record_request(await open_ledger(), "one")
    finally:
        os.umask(previous)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("usage.db*")}
    assert modes == dict.fromkeys(["usage.db", "usage.db-wal", "usage.db-shm"], "0o600")
