"""Edit the API keys file: one change at a time, validated before and after, written atomically.

The rest of the text, comments included, stays as it is. Readers see the old file or the new one, never a part.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

import yaml

from llama2_server.admission.keys_file import KeyRecord, KeysFileError, entry, parse, parse_lines

DEFAULT_INDENT = "  "
NEW_FILE_MODE = 0o600


def read_records(path: Path) -> dict[str, KeyRecord]:
    """Return the records of the file by key id.

    Raises:
        KeysFileError: the file cannot be used.
    """
    return parse(path, _read(path))


def edit(path: Path, changes: dict[str, KeyRecord | None]) -> None:
    """Add, replace or remove (None) the entries of some key ids; a missing file is created with mode 0600.

    Raises:
        KeysFileError: the file is not valid, has another form than one block of entries, lacks an entry to remove, or
            cannot be written. The file is unchanged.
    """
    with _locked(path.parent):
        exists = path.exists()
        text = _read(path) if exists else "keys:\n"
        before = parse(path, text) if exists else {}
        after = {key_id: record for key_id, record in {**before, **changes}.items() if record is not None}
        if not after:
            raise KeysFileError(
                f"--api-keys-file: {path}: the last key cannot be removed, because a server needs one; "
                "add another key first, or stop the servers and delete the file"
            )
        edited = _apply(path, text, changes)
        if parse(path, edited) != after:
            raise KeysFileError(f"--api-keys-file: {path}: cannot be edited in its form; edit it by hand")
        _replace(path, edited)


def _apply(path: Path, text: str, changes: dict[str, KeyRecord | None]) -> str:
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    spans = _spans(path, text)
    first = next(iter(spans.values()), None)
    indent = DEFAULT_INDENT if first is None else lines[first[0]][: _indentation(lines[first[0]])]
    end = 1 + (max(last for _, last in spans.values()) if spans else _line_of_keys(path, lines))
    added = [(key_id, record) for key_id, record in changes.items() if record is not None and key_id not in spans]
    lines[end:end] = [f"{indent}{entry(key_id, record)}\n" for key_id, record in added]
    for key_id, (start, last) in sorted(spans.items(), key=lambda item: item[1], reverse=True):
        if key_id in changes:
            record = changes[key_id]
            lines[start : last + 1] = [] if record is None else [f"{indent}{entry(key_id, record)}\n"]
    return "".join(lines)


def _spans(path: Path, text: str) -> dict[str, tuple[int, int]]:
    """Return the first and the last line of each entry, counted from 0."""
    if parse_lines(text) is not None:  # one line per entry
        return {
            line.strip().partition(":")[0].strip("'"): (number, number)
            for number, line in enumerate(text.splitlines())
            if line.startswith(" ") and not line.lstrip().startswith("#") and line.strip()
        }
    root = yaml.compose(text, yaml.SafeLoader)
    keys = next((value for key, value in root.value if key.value == "keys"), None) if root is not None else None
    if keys is None or not isinstance(keys, yaml.MappingNode):
        return {}
    if keys.flow_style and keys.value:
        raise KeysFileError(f"--api-keys-file: {path}: `keys` is in braces; put each entry on its own line")
    return {key.value: (key.start_mark.line, _last_line(value)) for key, value in keys.value}


def _last_line(node: yaml.Node) -> int:
    """Return the last line of a node; the end of a block in YAML includes the blank lines and comments after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.line if node.end_mark.column > 0 else node.end_mark.line - 1


def _line_of_keys(path: Path, lines: list[str]) -> int:
    for number, line in enumerate(lines):
        if line.split("#")[0].rstrip() == "keys:":
            return number
    raise KeysFileError(f"--api-keys-file: {path}: has no line `keys:`; add it")


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise KeysFileError(f"--api-keys-file: cannot read {path}: {reason}; pass the servers' keys file") from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait for other editors of files in the directory; the system releases the lock of a process that ends."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysFileError(f"--api-keys-file: cannot open {directory}: {error.strerror}; create it") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write the text to a new file with the mode and owner of the old one, and put it in its place."""
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary: str | None = None
    try:
        status = target.stat() if target.exists() else None
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, NEW_FILE_MODE if status is None else status.st_mode & 0o7777)
            if status is not None:
                os.fchown(descriptor, status.st_uid, status.st_gid)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
        temporary = None
        _sync(target.parent)
    except OSError as error:
        raise KeysFileError(
            f"--api-keys-file: cannot write {path}: {error.strerror}; run the command as the owner of the file"
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def state_of(record: KeyRecord, today: date) -> str:
    """Return whether a key is valid: "valid", "expired" or "disabled"."""
    if record.expired(today):
        return "expired"
    return "valid" if record.enabled else "disabled"
