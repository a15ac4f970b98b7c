"""Read and write the API keys file.

A server reads a changed file in a child process (`read_in_child`), because parsing YAML takes seconds and would hold
the event loop. The child is this module as a program: it prints one line per key, which the server keeps as text.
"""

import asyncio
import hashlib
import hmac
import secrets
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama2_server.admission.keys.account_limits import NO_LIMITS, AccountLimits
from llama2_server.admission.keys.line_format import parse_lines
from llama2_server.configuration_error import ConfigurationError

EXIT_INVALID = 2
LINES_PER_TURN = 200  # of the child's output, parsed in one turn of the event loop
MAX_LINE_BYTES = 1024 * 1024
CREATE_WITH = "llama2-server keys new writes valid entries"


class KeysFileError(ConfigurationError):
    """The keys file cannot be used; the one-line message names the file and the entry."""


# Databases and logs cannot hold control characters.
AccountId = Annotated[
    str, Field(coerce_numbers_to_str=True, min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
]


class KeyRecord(BaseModel):
    """The entry of one key in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    account: AccountId
    name: str = ""
    enabled: bool = True
    expires: date | None = None
    """Last day of the key, in UTC."""

    def expired(self, today: date) -> bool:
        """Return whether the key is no longer valid on this day, in UTC."""
        return self.expires is not None and today > self.expires


class KeysFile(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: dict[Annotated[str, Field(pattern="^[0-9a-f]{12}$")], KeyRecord]
    accounts: dict[AccountId, AccountLimits] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The content of the file in the form in which a server keeps it."""

    keys: Mapping[str, str]
    """The record of each key id as JSON: text costs the garbage collector nothing."""
    accounts: Mapping[str, str] = field(default_factory=dict)
    """The limits of each account that has some, as JSON."""

    def limits(self, account_id: str) -> AccountLimits:
        """Return the limits of an account."""
        limits = self.accounts.get(account_id)
        return NO_LIMITS if limits is None else AccountLimits.model_validate_json(limits)


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
    content = parse(path, text)
    return KeyTable(_as_json(content.keys), _as_json(content.accounts))


def parse(path: Path, text: str) -> KeysFile:
    """Return the content of the text of a keys file.

    Raises:
        KeysFileError: the text is not a valid keys file; the message names `path`.
    """
    try:
        document = parse_lines(text) or yaml.safe_load(text)  # the loader in C crashes on deeply nested text
        return KeysFile.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "keys"
        fix = "llama2-server keys limit writes valid entries" if key.startswith("accounts") else CREATE_WITH
        raise KeysFileError(f"--api-keys-file: {path}: {key}: {first['msg']}; {fix}") from error
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
        keys: dict[str, str] = {}
        accounts: dict[str, str] = {}
        async for line in child.stdout:
            kind, name, value = line.decode().rstrip("\n").split("\t", 2)
            (keys if kind == "key" else accounts)[name] = value
            if (len(keys) + len(accounts)) % LINES_PER_TURN == 0:
                await asyncio.sleep(0)
        message = (await child.stderr.read()).decode(errors="replace").strip()
        if await child.wait() != 0:
            reason = message if child.returncode == EXIT_INVALID else f"its reader ended with {child.returncode}"
            raise KeysFileError(reason)
    finally:
        if child.returncode is None:
            child.kill()
    return KeyTable(keys, accounts)


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


def _as_json(entries: Mapping[str, BaseModel]) -> dict[str, str]:
    return {name: value.model_dump_json() for name, value in entries.items()}


def _main(path: Path) -> None:
    try:
        table = read(path)
    except KeysFileError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_INVALID)
    # Neither key ids, account ids nor JSON contain tabs.
    for kind, entries in (("key", table.keys), ("account", table.accounts)):
        sys.stdout.writelines(f"{kind}\t{name}\t{value}\n" for name, value in entries.items())


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
