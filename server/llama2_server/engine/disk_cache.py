"""A file that caches a slow result of one start for the next start."""

import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def load(file: Path | None, key: str) -> Any:
    """Return the JSON value that `save` wrote with this key, or None if the key differs or the file is unreadable."""
    if file is None:
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return document["value"] if document["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def save(file: Path | None, key: str, value: object) -> None:
    """Replace the file with a value at once; `key` identifies all inputs that the value depends on.

    A process that is killed here leaves the old file. If the file cannot be written, log a warning.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, json.dumps({"key": key, "value": value}, indent=2) + "\n")
    except OSError as error:
        logger.warning("cannot write the cache file; the next start will be slower: %s", error)


def _replace(file: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
