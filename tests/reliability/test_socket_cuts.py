"""Streams of real servers that break off over real sockets: the joined text is exact, and the account pays once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.reliability.cuts.clients import CLIENT, CONNECTION, REPLICA, SIGKILL, SIGTERM
from tests.reliability.cuts.costs import Outcome
from tests.reliability.cuts.run import CUTS, RESTARTS, cut_streams
from tests.support.forks import Forks
from tests.support.servers.postgres_server import PostgresCluster

# Starts of servers take seconds on a busy machine.
pytestmark = pytest.mark.timeout(1000)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Run the process that forks servers."""
    with Forks.running(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


def check(outcome: Outcome, seed: int, replicas: int, kinds: set[str]) -> None:
    """Check that no promise is broken, and that all cuts were made."""
    replay = f"python -m tests.reliability.cuts --seed {seed} --replicas {replicas}"
    assert outcome.broken == [], f"seed {seed} fails; replay it: {replay}"
    assert outcome.cuts.total() == CUTS
    assert {kind for kind, _ in outcome.cuts} == kinds
    assert sum(count for (kind, _), count in outcome.cuts.items() if kind in (SIGKILL, SIGTERM)) == RESTARTS


@pytest.mark.parametrize("seed", [1, 2])
async def test_cuts_of_one_server(forks: Forks, tmp_path: Path, seed: int) -> None:
    """100 cuts, 10 of them with a restart of the server on its data directory."""
    outcome = await cut_streams(seed, forks, tmp_path)
    check(outcome, seed, 1, {CONNECTION, CLIENT, SIGKILL, SIGTERM})


async def test_cuts_with_a_second_replica(forks: Forks, tmp_path: Path, postgres: PostgresCluster) -> None:
    """50 cuts, 5 of them with a restart of a server; a client continues on the replica that it did not call before."""
    outcome = await cut_streams(3, forks, tmp_path, postgres.new_database())
    check(outcome, 3, 2, {CONNECTION, CLIENT, SIGKILL, SIGTERM, REPLICA})
