"""Authenticate API keys. Accounts are the unit of fairness, quota and billing.

The format of a key is `l2_ID_SECRET`. For each public ID, the keys file has the account and an HMAC-SHA256 of the
whole key with a random salt, never the key (keys_file.py). The file is read again when it changes.
"""

import asyncio
import hmac
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Protocol

from llama2_server.admission.keys import keys_file
from llama2_server.admission.keys.account_limits import NO_LIMITS, AccountLimits
from llama2_server.admission.keys.keys_file import KeyRecord, KeysFileError
from llama2_server.errors import AccountDisabled, Unauthenticated

logger = logging.getLogger(__name__)

RELOAD_SECONDS = 1.0
KEY_PATTERN = re.compile(r"l2_([0-9a-f]{12})_[0-9A-Za-z_-]{43}")
MAX_HEADER_CHARACTERS = 256


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

    def limits(self, account_id: str) -> AccountLimits:
        """Return the current limits of an account."""

    async def watch(self) -> None:
        """Apply changes of the accounts while the server runs, until cancelled."""


class AnonymousAuthenticator:
    """Every client is anonymous."""

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the anonymous account; a key is ignored."""
        return ANONYMOUS

    def limits(self, account_id: str) -> AccountLimits:
        """Return no limits: only a keys file has some."""
        return NO_LIMITS

    async def watch(self) -> None:
        """Return at once: nothing changes."""


class ApiKeyAuthenticator:
    """Accounts by the API keys of a file. `watch` applies changes of the file."""

    def __init__(self, path: Path) -> None:
        """Read the file; raises KeysFileError if it cannot be used."""
        self._path = path
        self._stamp = _stamp(path)
        self._table = keys_file.read(path)

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the account of the call's API key; see `Authenticator.authenticate` for the errors."""
        headers = [value for key, value in metadata if key == "authorization"]
        if len(headers) != 1 or not isinstance(headers[0], str) or len(headers[0]) > MAX_HEADER_CHARACTERS:
            raise Unauthenticated
        scheme, _, key = headers[0].partition(" ")
        match = KEY_PATTERN.fullmatch(key.strip())
        if scheme.lower() != "bearer" or match is None:
            raise Unauthenticated
        # An unknown id takes the same time as a known one: one record, one digest and one comparison.
        record = KeyRecord.model_validate_json(self._table.keys.get(match[1], _UNKNOWN_KEY))
        known = match[1] in self._table.keys
        if not hmac.compare_digest(keys_file.digest(record.salt, match[0]), record.digest) or not known:
            raise Unauthenticated
        if record.expired(datetime.now(UTC).date()):
            raise Unauthenticated
        if not record.enabled:
            raise AccountDisabled
        return Account(record.account, record.name)

    def limits(self, account_id: str) -> AccountLimits:
        """Return the limits of the account in the file."""
        return self._table.limits(account_id)

    async def watch(self) -> NoReturn:
        """Read the file in a child process when it changes; log a file that cannot be used, and keep the keys.

        Kubernetes updates a Secret by swapping a symbolic link, which changes the file's identity.
        """
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await self._reload()

    async def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._table = await keys_file.read_in_child(self._path)
            logger.info("read %d API keys from %s", len(self._table.keys), self._path)
        except (KeysFileError, OSError) as error:
            logger.error("API keys reload failed; keeping the previous keys: %s", error)  # noqa: TRY400  # a traceback would add nothing
        except Exception:  # the next change of the file must be read, too
            logger.exception("API keys reload failed; keeping the previous keys")


_UNKNOWN_KEY = KeyRecord(salt="0" * 32, digest="0" * 64, account="unknown", enabled=False).model_dump_json()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes with the file's content; None if the file is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
