"""API key -> Account: who calls is what is served in turn, and what limits and prices apply to.

A key reads `l2_ID_SECRET`. The keys file holds, under the key's public ID, the account and an HMAC-SHA256 of the whole
key under a random salt, never the key. The file is read anew when it changes.
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
    """The keys file cannot be used; the message is one line that names the file and the entry."""


@dataclass(frozen=True, slots=True)
class Account:
    """One account, by the id that the card's overrides use."""

    id: str
    name: str = ""


ANONYMOUS = Account("anonymous")
"""Every caller's account while the server runs open, without keys."""

Metadata = Iterable[tuple[str, str | bytes]]


class Authenticator(Protocol):
    """Tells whose call it is."""

    def authenticate(self, metadata: Metadata) -> Account:
        """The account of a call, by its metadata.

        Raises:
            Unauthenticated: no key, or not exactly one valid key.
            AccountDisabled: the key is good and its account may not call.
        """


class AnonymousAuthenticator:
    """Everybody is anonymous."""

    def authenticate(self, metadata: Metadata) -> Account:
        """Always the anonymous account; a key that is sent all the same is not looked at."""
        return ANONYMOUS


class _Entry(BaseModel):
    """One key in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    account: Annotated[str, Field(coerce_numbers_to_str=True, min_length=1, max_length=128)]
    name: str = ""
    enabled: bool = True


class _KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: dict[Annotated[str, Field(pattern="^[0-9a-f]{12}$")], _Entry]


class ApiKeyAuthenticator:
    """Accounts by the keys of a file; `watch` keeps up with it."""

    def __init__(self, path: Path) -> None:
        """Read the file; raises KeysFileError if it cannot be used."""
        self._path = path
        self._stamp = _stamp(path)
        self._entries = _read(path)

    def authenticate(self, metadata: Metadata) -> Account:
        """See Accounts."""
        headers = [value for key, value in metadata if key == "authorization"]
        if len(headers) != 1 or not isinstance(headers[0], str) or len(headers[0]) > MAX_HEADER_CHARACTERS:
            raise Unauthenticated
        scheme, _, key = headers[0].partition(" ")
        match = KEY_PATTERN.fullmatch(key.strip())
        if scheme.lower() != "bearer" or match is None:
            raise Unauthenticated
        # An unknown id costs the same digest and comparison as a known one.
        entry = self._entries.get(match[1], _NOBODY)
        if not hmac.compare_digest(_digest(entry.salt, match[0]), entry.digest) or entry is _NOBODY:
            raise Unauthenticated
        if not entry.enabled:
            raise AccountDisabled
        return Account(entry.account, entry.name)

    async def watch(self) -> NoReturn:
        """Read the file again whenever it changes; one that cannot be used leaves the keys as they are, and is logged.

        A Kubernetes secret changes by the swap of a link, which a look at the file's identity sees.
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
            self._entries = _read(self._path)
            logger.info("read %d keys from %s", len(self._entries), self._path)
        except KeysFileError as error:
            logger.error("the keys stay as they were: %s", error)  # noqa: TRY400  # a traceback would say no more


def new_key(account: str, name: str = "") -> tuple[str, str]:
    """A new key for an account, and the line that goes under `keys:` in the file."""
    key_id, salt = secrets.token_hex(6), secrets.token_hex(16)
    key = f"l2_{key_id}_{secrets.token_urlsafe(32)}"
    entry = {"account": account, "name": name, "enabled": True, "salt": salt, "digest": _digest(salt, key)}
    return key, yaml.safe_dump({key_id: entry}, default_flow_style=None, sort_keys=False, width=1000).strip()


def _digest(salt: str, key: str) -> str:
    return hmac.new(bytes.fromhex(salt), key.encode(), hashlib.sha256).hexdigest()


_NOBODY = _Entry(salt="0" * 32, digest="0" * 64, account="nobody", enabled=False)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when the file's content does."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> Mapping[str, _Entry]:
    try:
        return _KeysFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).keys
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "keys"
        raise KeysFileError(f"keys file {path}: {key}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not YAML text"
        raise KeysFileError(f"keys file {path}: cannot be read ({reason})") from error
