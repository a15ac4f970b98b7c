"""What takes long to find out at a start, kept in a file for the next one."""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def recall(file: Path | None, found: str) -> Any:
    """What `keep` was given for the same `found`, as JSON has it; None if nothing was, or the file is broken."""
    if file is None:
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return document["kept"] if document["found"] == found else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep(file: Path | None, found: str, kept: object) -> None:
    """Keep what was found under these circumstances, instead of what was kept before; a full disk is only logged."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"found": found, "kept": kept}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("the next start has to find out again what takes time: %s", error)
