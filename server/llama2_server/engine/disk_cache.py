"""A file that caches a slow result of one start for the next start."""

import json
import logging
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
    """Replace the content of the file with a value; `key` identifies all inputs that the value depends on.

    If the file cannot be written, log a warning.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"key": key, "value": value}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("cannot write the cache file; the next start will be slower: %s", error)
