"""The API keys of the simulated accounts, in a real keys file."""

import asyncio
import itertools
import random
from functools import cache
from pathlib import Path

import pytest

from llama2_server.admission.keys import keys_file
from llama2_server.admission.keys.keys_file import KeyTable, new_key

DISABLED = "disabled"


class Keys:
    """The keys file of all replicas."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.yaml"
        self._numbers = itertools.count()
        self.write()

    def header(self, account: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata with an account's key; none for `keyless`."""
        return () if account == "keyless" else (("authorization", f"Bearer {_entries()[account][0]}"),)

    def write(self, text: str | None = None) -> None:
        """Replace the file by one with other text, or with all keys and another comment."""
        new = self.path.with_suffix(".new")
        lines = "".join(f"  {entry}\n" for _, entry in _entries().values()) if text is None else ""
        # The number changes the size, because a new file can have the inode of the old one.
        new.write_text(f"{'#' * (1 + next(self._numbers))}\n{text or 'keys:'}\n{lines}")
        new.replace(self.path)


@cache
def _entries() -> dict[str, tuple[str, str]]:
    """Return the key and its line in the file, by account."""
    entries = {name: new_key(name) for name in (*(f"a{index}" for index in range(20)), DISABLED)}
    key, entry = entries[DISABLED]
    return entries | {DISABLED: (key, entry.replace("enabled: true", "enabled: false"))}


def patch_reload(patch: pytest.MonkeyPatch, draw: random.Random) -> None:
    """Read a changed keys file in this process, after a short time, instead of in a child process."""

    async def read(path: Path) -> KeyTable:
        await asyncio.sleep(draw.uniform(0, 0.1))
        return keys_file.read(path)

    patch.setattr(keys_file, "read_in_child", read)
