"""Servers that are killed over a real socket, at the moment when a client receives the end of its reply."""

from pathlib import Path

from tests.reliability.chaos.history import broken_totals, interrupted, read_records
from tests.reliability.chaos.kills import fast_card, kill_servers
from tests.support.forks import Forks

KILLS = 10  # `make chaos` kills 200


async def test_sigkill_at_completion(tmp_path: Path) -> None:
    """The tokens in the last message of a reply are in its durable record, also if each commit takes long."""
    data = tmp_path / "data"
    with Forks.running(tmp_path) as forks:
        history = await kill_servers(forks, data, fast_card(tmp_path), kills=KILLS, seed=1)
    records = read_records(data)
    assert [*history.broken_promises(records), *broken_totals(data)] == []
    assert len(history.completed) >= KILLS
    assert interrupted(records.values()) >= 1, "no kill interrupted a request"
