"""`llama2-server keys`: the life of the API keys in the keys file."""

import errno
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.cli.runner import error, invoke, output

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys import keys_editor
from llama2_server.admission.keys.keys_file import new_key, parse
from llama2_server.errors import Unauthenticated


def test_new_key_is_valid_with_the_printed_entry(tmp_path: Path) -> None:
    """The printed entry, added under `keys:`, makes the printed key valid."""
    *_, key, _, _, entry = output("keys", "new", "42", "--name", "Alice").splitlines()
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n{entry}\n")
    assert ApiKeyAuthenticator(file).authenticate((("authorization", f"Bearer {key}"),)).id == "42"
    assert key not in yaml.safe_dump(yaml.safe_load(file.read_text()))


def id_of(key: str) -> str:
    """Return the public part of a key."""
    return key.split("_", 2)[1]


def new(file: Path, account: str, *flags: str) -> str:
    """Add a key to a file with the command, and return the key."""
    return output("keys", "new", account, "--api-keys-file", str(file), *flags).removesuffix("\n")


def account_of(file: Path, key: str) -> str | None:
    """Return the account of a key by the file, or None if the key is rejected."""
    try:
        return ApiKeyAuthenticator(file).authenticate((("authorization", f"Bearer {key}"),)).id
    except Unauthenticated:
        return None


def rows(file: Path) -> list[list[str]]:
    """Return the table of `keys list` without its header."""
    header, *lines = output("keys", "list", "--api-keys-file", str(file)).splitlines()
    assert header.split() == ["key", "account", "state", "expires", "name"]
    return [line.split() for line in lines]


def test_life_of_a_key(tmp_path: Path) -> None:
    """A new key works, a rotated key has a successor and a last day, and a revoked key is rejected."""
    file = tmp_path / "keys.yaml"
    first = new(file, "42", "--name", "Alice", "--expires", "2999-12-31")
    assert file.stat().st_mode & 0o777 == 0o600
    assert rows(file) == [[id_of(first), "42", "valid", "2999-12-31", "Alice"]]
    second = output("keys", "rotate", id_of(first), "--api-keys-file", str(file)).removesuffix("\n")
    assert [account_of(file, key) for key in (first, second)] == ["42", "42"]
    last_day = datetime.now(UTC).date() + timedelta(days=7)
    assert [row[3] for row in rows(file)] in ([str(last_day), "Alice"], [str(last_day - timedelta(days=1)), "Alice"])
    assert output("keys", "revoke", id_of(first), LLAMA2_API_KEYS_FILE=str(file)) == (
        f"revoked {id_of(first)} of account 42\n"
    )
    third = output("keys", "rotate", id_of(second), "--keep-days", "0", "--api-keys-file", str(file)).removesuffix("\n")
    assert [account_of(file, key) for key in (first, second, third)] == [None, None, "42"]


def test_expired_key_is_rejected(tmp_path: Path) -> None:
    """The day after its last day, a key is as invalid as an unknown one."""
    file = tmp_path / "keys.yaml"
    today, yesterday = datetime.now(UTC).date(), datetime.now(UTC).date() - timedelta(days=1)
    keys = {}
    lines = ["keys:"]
    for day in (today + timedelta(days=1), yesterday):
        keys[day], line = new_key("42", expires=day)
        lines.append(f"  {line}")
    file.write_text("\n".join(lines) + "\n")
    assert [account_of(file, key) for key in keys.values()] == ["42", None]
    assert [row[2] for row in rows(file)] == ["valid", "expired"]


COMMENTED = """\
# Keys of the demo.
keys:
  # Alice asked for this one.
  {first}

  # The operator's.
  '{id}':
    account: ops
    salt: '{salt}'
    digest: '{digest}'
  # The end.
"""


def test_an_edit_keeps_the_rest_of_the_file(tmp_path: Path) -> None:
    """Comments, blank lines and other forms of entries stay, and so do the mode and a symbolic link."""
    first, line = new_key("alice")
    operator, record = "0123456789ab", {"salt": "0" * 32, "digest": "f" * 64}
    text = COMMENTED.format(first=line, id=operator, **record)
    stored = tmp_path / "stored.yaml"
    stored.write_text(text)
    stored.chmod(0o640)
    file = tmp_path / "keys.yaml"
    file.symlink_to(stored.name)
    added = new(file, "bob")
    assert file.is_symlink()
    assert stored.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.yaml", "stored.yaml"]
    lines = stored.read_text().splitlines(keepends=True)
    assert "".join(line for line in lines if id_of(added) not in line) == text
    output("keys", "revoke", id_of(added), "--api-keys-file", str(file))
    assert stored.read_text() == text
    output("keys", "revoke", operator, "--api-keys-file", str(file))
    assert stored.read_text() == text[: text.index(f"  '{operator}'")] + "  # The end.\n"
    assert account_of(file, first) == "alice"


def test_a_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    """The file was written by an editor that does not end the last line."""
    file = tmp_path / "keys.yaml"
    first, line = new_key("alice")
    file.write_text(f"keys:\n  {line}")
    second = new(file, "bob")
    assert [account_of(file, key) for key in (first, second)] == ["alice", "bob"]


def test_a_new_entry_has_the_indentation_of_the_first_one(tmp_path: Path) -> None:
    """The first entry has several lines, which are indented further."""
    file = tmp_path / "keys.yaml"
    text = "keys:\n    0123456789ab:\n        account: ops\n        salt: '{}'\n        digest: '{}'\n"
    file.write_text(text.format("0" * 32, "f" * 64))
    key = new(file, "bob")
    assert account_of(file, key) == "bob"
    assert file.read_text().splitlines()[-1].startswith(f"    {id_of(key)}: ")


def test_an_invalid_file_is_not_edited(tmp_path: Path) -> None:
    """A file that a server would reject is an error of every command, and stays unchanged."""
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n  abc: {account: '42'}\n")
    for command in (["new", "42"], ["list"], ["revoke", "abc"], ["rotate", "abc"]):
        result = invoke(["keys", *command, "--api-keys-file", str(file)], {})
        assert result.exit_code == 2
        assert f"--api-keys-file: {file}: keys.abc" in result.stderr
    assert file.read_text() == "keys:\n  abc: {account: '42'}\n"


def test_an_unknown_key_is_not_repeated(tmp_path: Path) -> None:
    """The argument may be a whole key, which is a secret."""
    file = tmp_path / "keys.yaml"
    key = new(file, "42")
    message = error("keys", "revoke", key, "--api-keys-file", str(file))
    assert message == f"KEY_ID: {file} has no such key; `llama2-server keys list` prints the ids"
    assert "the last key cannot be removed" in error("keys", "revoke", id_of(key), "--api-keys-file", str(file))


def test_edits_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    """Editors wait for each other, so that no edit is lost."""
    file = tmp_path / "keys.yaml"

    def add(number: int) -> None:
        entry = parse(file, f"keys:\n  {new_key(str(number))[1]}\n")
        keys_editor.edit(file, entry.keys)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(32)))
    assert sorted(record.account for record in keys_editor.read_file(file).keys.values()) == sorted(map(str, range(32)))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is one line; the file and its directory are as before."""
    file = tmp_path / "keys.yaml"
    new(file, "42")
    before = file.read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = invoke(["keys", "new", "7", "--api-keys-file", str(file)], {})
    assert (result.exit_code, result.stdout) == (2, "")  # no key that is not in the file
    assert f"--api-keys-file: cannot write {file}: No space left on device; " in result.stderr
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_script_reads_the_key_from_standard_output(tmp_path: Path) -> None:
    """The key is all of the standard output; where it went is on standard error."""
    file = tmp_path / "keys.yaml"
    result = invoke(["keys", "new", "7", "--api-keys-file", str(file)], {})
    key = result.stdout.removesuffix("\n")
    assert account_of(file, key) == "7"
    assert result.stderr == f"The key is shown only once; added to {file} as {id_of(key)}\n"


@given(
    accounts=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)),
    removed=st.integers(0, 10),
)
@settings(max_examples=50, deadline=None)
def test_edits_agree_with_yaml(accounts: list[str], removed: int) -> None:
    """Whatever the names, the edited file has the records that were added and not removed."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "keys.yaml"
        records = {}
        for account in ["first", *accounts]:
            (key_id, record) = next(iter(parse(file, f"keys:\n  {new_key(account, account)[1]}\n").keys.items()))
            keys_editor.edit(file, {key_id: record})
            records[key_id] = record
        for key_id in list(records)[1 : 1 + removed]:
            keys_editor.edit(file, {key_id: None})
            del records[key_id]
        assert keys_editor.read_file(file).keys == records
        assert set(yaml.safe_load(file.read_text())["keys"]) == set(records)
