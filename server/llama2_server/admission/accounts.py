"""Authenticate API keys. Accounts are the unit of fairness, quota and billing.

The format of a key is `l2_ID_SECRET`. For each public ID, the keys file has the account and an HMAC-SHA256 of the
whole key with a random salt, never the key. The file is read again when it changes.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama2_server.configuration_error import ConfigurationError
from llama2_server.errors import AccountDisabled, Unauthenticated

logger = logging.getLogger(__name__)

RELOAD_SECONDS = 1.0
KEY_PATTERN = re.compile(r"l2_([0-9a-f]{12})_[0-9A-Za-z_-]{43}")
MAX_HEADER_CHARACTERS = 256


class KeysFileError(ConfigurationError):
    """The keys file cannot be used; the one-line message names the file and the entry."""


@dataclass(frozen=True, slots=True)
class Account:
    """One account; the card's overrides use its id."""

    id: str
    name: str = ""


ANONYMOUS = Account("anonymous")
"""The account of every client while the server runs without API keys."""

Metadata = Iterable[tuple[str, str | bytes]]


class Authenticator(Protocol):
    """Finds the account of a call."""

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the account of a call, from its metadata.

        Raises:
            Unauthenticated: no key, or not exactly one valid key.
            AccountDisabled: the key is valid and its account is disabled.
        """

    async def watch(self) -> None:
        """Apply changes of the accounts while the server runs, until cancelled."""


class AnonymousAuthenticator:
    """Every client is anonymous."""

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the anonymous account; a key is ignored."""
        return ANONYMOUS

    async def watch(self) -> None:
        """Return at once: nothing changes."""


class _KeyRecord(BaseModel):
    """The entry of one key in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    account: Annotated[str, Field(coerce_numbers_to_str=True, min_length=1, max_length=128)]
    name: str = ""
    enabled: bool = True


class _KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: dict[Annotated[str, Field(pattern="^[0-9a-f]{12}$")], _KeyRecord]


class ApiKeyAuthenticator:
    """Accounts by the API keys of a file. `watch` applies changes of the file."""

    def __init__(self, path: Path) -> None:
        """Read the file; raises KeysFileError if it cannot be used."""
        self._path = path
        self._stamp = _stamp(path)
        self._records = _read(path)

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the account of the call's API key; see `Authenticator.authenticate` for the errors."""
        headers = [value for key, value in metadata if key == "authorization"]
        if len(headers) != 1 or not isinstance(headers[0], str) or len(headers[0]) > MAX_HEADER_CHARACTERS:
            raise Unauthenticated
        scheme, _, key = headers[0].partition(" ")
        match = KEY_PATTERN.fullmatch(key.strip())
        if scheme.lower() != "bearer" or match is None:
            raise Unauthenticated
        # An unknown id takes the same time as a known one: one digest and one comparison.
        record = self._records.get(match[1], _UNKNOWN_KEY)
        if not hmac.compare_digest(_digest(record.salt, match[0]), record.digest) or record is _UNKNOWN_KEY:
            raise Unauthenticated
        if not record.enabled:
            raise AccountDisabled
        return Account(record.account, record.name)

    async def watch(self) -> NoReturn:
        """Read the file again when it changes; a file that cannot be used is logged, and the current keys stay valid.

        Kubernetes updates a Secret by swapping a symbolic link, which changes the file's identity.
        """
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            self._reload()

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._records = _read(self._path)
            logger.info("read %d API keys from %s", len(self._records), self._path)
        except KeysFileError as error:
            logger.error("API keys reload failed; keeping the previous keys: %s", error)  # noqa: TRY400  # a traceback would add nothing


def new_key(account: str, name: str = "") -> tuple[str, str]:
    """Return a new key for an account, and its entry for the keys file, under `keys:`."""
    key_id, salt = secrets.token_hex(6), secrets.token_hex(16)
    key = f"l2_{key_id}_{secrets.token_urlsafe(32)}"
    record = {"account": account, "name": name, "enabled": True, "salt": salt, "digest": _digest(salt, key)}
    return key, yaml.safe_dump({key_id: record}, default_flow_style=None, sort_keys=False, width=1000).strip()


def _digest(salt: str, key: str) -> str:
    return hmac.new(bytes.fromhex(salt), key.encode(), hashlib.sha256).hexdigest()


_UNKNOWN_KEY = _KeyRecord(salt="0" * 32, digest="0" * 64, account="unknown", enabled=False)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes with the file's content; None if the file is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> Mapping[str, _KeyRecord]:
    try:
        return _KeysFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).keys
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "keys"
        raise KeysFileError(f"--api-keys-file: {path}: {key}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not YAML text"
        raise KeysFileError(f"--api-keys-file: cannot read {path}: {reason}") from error
