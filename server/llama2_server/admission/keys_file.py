"""Read and write the API keys file.

A server reads a changed file in a child process (`read_in_child`), because parsing YAML takes seconds and would hold
the event loop. The child is this module as a program: it prints one line per key, which the server keeps as text.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama2_server.configuration_error import ConfigurationError

EXIT_INVALID = 2
LINES_PER_TURN = 200  # of the child's output, parsed in one turn of the event loop
MAX_LINE_BYTES = 1024 * 1024
CREATE_WITH = "llama2-server keys new writes valid entries"


class KeysFileError(ConfigurationError):
    """The keys file cannot be used; the one-line message names the file and the entry."""


class KeyRecord(BaseModel):
    """The entry of one key in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    # Databases and logs cannot hold control characters.
    account: Annotated[
        str, Field(coerce_numbers_to_str=True, min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    ]
    name: str = ""
    enabled: bool = True
    expires: date | None = None
    """Last day of the key, in UTC."""

    def expired(self, today: date) -> bool:
        """Return whether the key is no longer valid on this day, in UTC."""
        return self.expires is not None and today > self.expires


class _KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: dict[Annotated[str, Field(pattern="^[0-9a-f]{12}$")], KeyRecord]


KeyTable = Mapping[str, str]
"""The record of each key id as JSON: text costs the garbage collector nothing."""


def read(path: Path) -> KeyTable:
    """Read the file in this process.

    Raises:
        KeysFileError: the file cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise KeysFileError(f"--api-keys-file: cannot read {path}: {reason}; {CREATE_WITH}") from error
    return {key_id: record.model_dump_json() for key_id, record in parse(path, text).items()}


def parse(path: Path, text: str) -> dict[str, KeyRecord]:
    """Return the records in the text of a keys file, by key id.

    Raises:
        KeysFileError: the text is not a valid keys file; the message names `path`.
    """
    try:
        document = parse_lines(text) or yaml.safe_load(text)  # the loader in C crashes on deeply nested text
        return _KeysFile.model_validate(document).keys
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "keys"
        raise KeysFileError(f"--api-keys-file: {path}: {key}: {first['msg']}; {CREATE_WITH}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise KeysFileError(f"--api-keys-file: cannot read {path}: not YAML text; {CREATE_WITH}") from error


async def read_in_child(path: Path) -> KeyTable:
    """Read the file in a child process; the event loop only collects its lines, a few per turn.

    Raises:
        KeysFileError: the file cannot be used.
    """
    # -P: the working directory is not on the module path.
    program = (sys.executable, "-P", "-m", __name__, str(path))
    child = await asyncio.create_subprocess_exec(*program, stdout=PIPE, stderr=PIPE, limit=MAX_LINE_BYTES)
    try:
        if child.stdout is None or child.stderr is None:
            raise RuntimeError("the child has no pipes")
        table: dict[str, str] = {}
        async for line in child.stdout:
            key_id, _, record = line.decode().rstrip("\n").partition(" ")
            table[key_id] = record
            if len(table) % LINES_PER_TURN == 0:
                await asyncio.sleep(0)
        message = (await child.stderr.read()).decode(errors="replace").strip()
        if await child.wait() != 0:
            reason = message if child.returncode == EXIT_INVALID else f"its reader ended with {child.returncode}"
            raise KeysFileError(reason)
    finally:
        if child.returncode is None:
            child.kill()
    return table


def new_key(account: str, name: str = "", expires: date | None = None) -> tuple[str, str]:
    """Return a new key for an account, and its entry for the keys file, under `keys:`."""
    key_id, salt = secrets.token_hex(6), secrets.token_hex(16)
    key = f"l2_{key_id}_{secrets.token_urlsafe(32)}"
    record = KeyRecord(salt=salt, digest=digest(salt, key), account=account, name=name, expires=expires)
    return key, entry(key_id, record)


def entry(key_id: str, record: KeyRecord) -> str:
    """Return the line of a key for the keys file, without indentation."""
    fields = {"account": record.account, "name": record.name, "enabled": record.enabled}
    fields |= {} if record.expires is None else {"expires": record.expires}
    fields |= {"salt": record.salt, "digest": record.digest}
    return yaml.safe_dump({key_id: fields}, default_flow_style=None, sort_keys=False, width=1000).strip()


def digest(salt: str, key: str) -> str:
    """Return the hexadecimal HMAC-SHA256 of a key."""
    return hmac.new(bytes.fromhex(salt), key.encode(), hashlib.sha256).hexdigest()


# An entry as `llama2-server keys new` prints it. A plain scalar that YAML could read as another type does not match.
_HEX = r"(?:'([0-9a-f]{%d})'|(?=[0-9]*[a-f]|0[0-9]*[89])(?!0b[01]+\b)([0-9a-f]{%d}))"
_TEXT = r"(?:'([^'\n]*)'|(?!(?i:true|false|yes|no|on|off|null|y|n)\b)([A-Za-z](?:[A-Za-z0-9 _.@/-]*[A-Za-z0-9_.@/-])?))"
_LINE = re.compile(
    rf"( +){_HEX % (12, 12)}: \{{account: {_TEXT}, name: {_TEXT}, enabled: (true|false), "
    rf"(?:expires: ([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}), )?salt: {_HEX % (32, 32)}, digest: {_HEX % (64, 64)}\}}"
)


def parse_lines(text: str) -> dict[str, object] | None:
    """Parse a file of nothing but lines that `keys new` prints, much faster than YAML does; None for another."""
    first, *lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")] or [""]
    if first != "keys:" or not lines:
        return None
    keys: dict[str, dict[str, object]] = {}
    indents = set()
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        indent, quoted_id, plain_id, *groups = match.groups()
        expires = groups.pop(5)
        # Each other value has a quoted form and a plain one.
        account, name, enabled, salt, key_digest = (text for text in groups if text is not None)
        key_id = quoted_id or plain_id
        indents.add(indent)
        keys[key_id] = {
            "account": account,
            "name": name,
            "enabled": enabled == "true",
            "salt": salt,
            "digest": key_digest,
        }
        if expires is not None:
            try:
                keys[key_id]["expires"] = date.fromisoformat(expires)
            except ValueError:
                return None
    return {"keys": keys} if len(indents) == 1 else None


def _main(path: Path) -> None:
    try:
        table = read(path)
    except KeysFileError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_INVALID)
    sys.stdout.writelines(f"{key_id} {record}\n" for key_id, record in table.items())


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
