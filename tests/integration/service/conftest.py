"""Accounts, a card with a response cache, and stored usage records for tests of the service."""

import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.support.service import with_config

from llama2_server.admission.accounts import Account, AnonymousAuthenticator, Metadata
from llama2_server.card import ModelCard, RequestsPerMinute


class AccountsByHeader(AnonymousAuthenticator):
    """An authenticator that trusts the header `account`: tests of sharing need several accounts, but no keys."""

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the account that the metadata names, or the account `a`."""
        return Account(str(dict(metadata).get("account", "a")))


def as_account(name: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call from this account."""
    return (("account", name),)


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
