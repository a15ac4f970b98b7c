"""Cards and stored usage records for tests of the service."""

import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.support.service import with_config

from llama2_server.card import ModelCard, RequestsPerMinute


@pytest.fixture
def caching_card(demo_card: ModelCard) -> ModelCard:
    """Return the demo card, with its response cache and a practically unlimited quota."""
    assert demo_card.constellation_config.infer_response_cache == "in_memory"
    return with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))


def limited(card: ModelCard, requests: int) -> ModelCard:
    """Return the card with this quota, and without a response cache."""
    quota = RequestsPerMinute(default=requests, accounts={})
    return with_config(card, infer_response_cache=None, max_requests_per_min=quota)


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the usage records of a data directory, as stored, with the neurons as a decimal."""
    connection = sqlite3.connect(folder / "usage.db")
    connection.row_factory = sqlite3.Row
    for row in connection.execute("SELECT * FROM usage_records"):
        yield dict(row) | {"neurons": Decimal(row["nanoneurons"]).scaleb(-9)}
    connection.close()
