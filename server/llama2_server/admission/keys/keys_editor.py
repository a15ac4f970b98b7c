"""Edit the API keys file: one change at a time, validated before and after, written atomically.

The rest of the text, comments included, stays as it is. Readers see the old file or the new one, never a part.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import TypeVar

import yaml

from llama2_server.admission.keys import account_limits
from llama2_server.admission.keys.account_limits import AccountLimits
from llama2_server.admission.keys.keys_file import KeyRecord, KeysFile, KeysFileError, entry, parse
from llama2_server.admission.keys.line_format import parse_lines

DEFAULT_INDENT = "  "
NEW_FILE_MODE = 0o600

Value = TypeVar("Value")
_Entries = Mapping[str, str | None]
"""The new line of each changed entry, without indentation; None removes it."""


def read_file(path: Path) -> KeysFile:
    """Return the content of the file.

    Raises:
        KeysFileError: the file cannot be used.
    """
    return parse(path, _read(path))


def edit(
    path: Path,
    changes: Mapping[str, KeyRecord | None],
    limits: Mapping[str, AccountLimits | None] | None = None,
) -> None:
    """Add, replace or remove (None) the entries of some key ids, and the limits of some accounts.

    A missing file is created with mode 0600.

    Raises:
        KeysFileError: the file is not valid, has another form than one block of entries, lacks an entry to remove, or
            cannot be written. The file is unchanged.
    """
    limits = limits or {}
    with _locked(path.parent):
        exists = path.exists()
        text = _read(path) if exists else "keys:\n"
        before = parse(path, text) if exists else KeysFile(keys={})
        after = KeysFile(keys=_merged(before.keys, changes), accounts=_merged(before.accounts, limits))
        if not after.keys:
            raise KeysFileError(
                f"--api-keys-file: {path}: the last key cannot be removed, because a server needs one; "
                "add another key first, or stop the servers and delete the file"
            )
        keys = {name: None if one is None else entry(name, one) for name, one in changes.items()}
        accounts = {name: None if one is None else account_limits.entry(name, one) for name, one in limits.items()}
        edited = _apply(path, _apply(path, text, "keys", keys), "accounts", accounts)
        if parse(path, edited) != after:
            raise KeysFileError(f"--api-keys-file: {path}: cannot be edited in its form; edit it by hand")
        _replace(path, edited)


def _merged(before: Mapping[str, Value], changes: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: value for name, value in {**before, **changes}.items() if value is not None}


def _apply(path: Path, text: str, section: str, changes: _Entries) -> str:
    """Return the text with the changes of the entries of a section, which is created if it is missing."""
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    spans = _spans(path, text, section)
    first = next(iter(spans.values()), None)
    indent = DEFAULT_INDENT if first is None else lines[first[0]][: _indentation(lines[first[0]])]
    added = [f"{indent}{line}\n" for name, line in changes.items() if line is not None and name not in spans]
    if added:
        if not spans and section != "keys" and _line_of(lines, section) is None:
            lines.append(f"{section}:\n")
        end = 1 + (max(last for _, last in spans.values()) if spans else _require_line_of(path, lines, section))
        lines[end:end] = added
    for name, (start, last) in sorted(spans.items(), key=lambda item: item[1], reverse=True):
        if name in changes:
            line = changes[name]
            lines[start : last + 1] = [] if line is None else [f"{indent}{line}\n"]
    if spans.keys() == {name for name in spans if changes.get(name, "") is None} and section != "keys" and not added:
        lines = [line for line in lines if line.split("#")[0].rstrip() != f"{section}:"]  # YAML reads it as null
    return "".join(lines)


def _spans(path: Path, text: str, section: str) -> dict[str, tuple[int, int]]:
    """Return the first and the last line of each entry of a section, counted from 0."""
    if section == "keys" and parse_lines(text) is not None:  # one line per entry; faster than YAML
        return _spans_of_lines(text)
    root = yaml.compose(text, yaml.SafeLoader)
    node = next((value for key, value in root.value if key.value == section), None) if root is not None else None
    if node is None or not isinstance(node, yaml.MappingNode):
        return {}
    if node.flow_style and node.value:
        raise KeysFileError(f"--api-keys-file: {path}: `{section}` is in braces; put each entry on its own line")
    return {key.value: (key.start_mark.line, _last_line(value)) for key, value in node.value}


def _spans_of_lines(text: str) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    section = ""
    for number, line in enumerate(text.splitlines()):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line.startswith(" "):
            section = line
        elif section == "keys:":
            spans[line.strip().partition(":")[0].strip("'")] = (number, number)
    return spans


def _last_line(node: yaml.Node) -> int:
    """Return the last line of a node; the end of a block in YAML includes the blank lines and comments after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.line if node.end_mark.column > 0 else node.end_mark.line - 1


def _line_of(lines: list[str], section: str) -> int | None:
    return next((number for number, line in enumerate(lines) if line.split("#")[0].rstrip() == f"{section}:"), None)


def _require_line_of(path: Path, lines: list[str], section: str) -> int:
    number = _line_of(lines, section)
    if number is None:
        raise KeysFileError(f"--api-keys-file: {path}: has no line `{section}:`; add it")
    return number


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
