"""What takes long to find out at a start, kept in a file for the next one."""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def load(file: Path | None, key: str) -> Any:
    """What `save` was given with this key, as JSON has it; None if that was something else, or the file is broken."""
    if file is None:
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return document["kept"] if document["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def save(file: Path | None, key: str, kept: object) -> None:
    """Keep what was found out instead of what the file held; `key` tells all that it depends on.

    Where it cannot be written, one log line says so.
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"key": key, "kept": kept}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("the next start has to find out again what takes time: %s", error)
