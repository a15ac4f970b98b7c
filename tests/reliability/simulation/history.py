"""The history of a simulation: what happened, in the order of the virtual time. It can be saved and read again."""

import asyncio
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
"""An event: `at` in virtual seconds, `event`, and its attributes."""


class History:
    """Events in order."""

    def __init__(self, events: list[Event] | None = None) -> None:
        self.events = events or []

    def add(self, event: str, **attributes: Any) -> None:
        """Add an event that happens now."""
        self.events.append({"at": asyncio.get_running_loop().time(), "event": event, **attributes})

    def of(self, *events: str) -> Iterator[Event]:
        """Yield the events of these kinds."""
        return (event for event in self.events if event["event"] in events)

    def digest(self) -> str:
        """Return a value that two equal histories share."""
        return hashlib.sha256(json.dumps(self.events, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write one line per event; a name that ends with .gz is compressed."""
        text = "".join(json.dumps(event) + "\n" for event in self.events).encode()
        path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)

    @classmethod
    def load(cls, path: Path) -> "History":
        """Read a saved history."""
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        return cls([json.loads(line) for line in text.splitlines()])
