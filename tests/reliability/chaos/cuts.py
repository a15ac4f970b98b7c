"""Streams that break off: the joined text is that of a stream without a cut, and the costs are those of one call."""

import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.reliability.chaos.scene import Scene
from tests.reliability.cuts.clients import SIGKILL, SIGTERM
from tests.reliability.cuts.run import CUTS, cut_streams
from tests.support.servers.postgres_server import PostgresCluster, running_postgres

REPLICAS_EVERY = 3
"""Every third seed has a second replica, with PostgreSQL."""


async def play_cuts(scene: Scene, cuts: int) -> None:
    """Random cuts of streams with idempotency keys, with restarts of clients and servers, and two replicas."""
    first, made = scene.draw.randrange(10**6), Counter[str]()
    replies, skipped = 0, ""
    with ExitStack() as stack:
        cluster: PostgresCluster | None = None
        try:
            cluster = stack.enter_context(running_postgres())
        except pytest.skip.Exception as error:
            skipped = f"; {error}"
        for number, begin in enumerate(range(0, cuts, CUTS)):
            seed, with_replica = first + number, number % REPLICAS_EVERY == REPLICAS_EVERY - 1
            if with_replica and cluster is None:
                continue
            url = cluster.new_database() if with_replica and cluster is not None else None
            folder = Path(tempfile.mkdtemp(dir=scene.folder))
            replay = f"python -m tests.reliability.cuts --seed {seed} --replicas {1 + with_replica}"
            try:
                outcome = await cut_streams(seed, scene.forks, folder, url, min(CUTS, cuts - begin))
            except Exception as error:
                error.add_note(f"seed {seed}, replay: {replay}")
                raise
            replies += outcome.replies
            made["replicas"] += outcome.cuts.total() if with_replica else 0
            for (kind, _), count in outcome.cuts.items():
                made[kind] += count
            if outcome.broken:
                scene.broken += [f"seed {seed} fails, replay: {replay}", *outcome.broken]
    total = sum(made[kind] for kind in made if kind != "replicas")
    restarts = made[SIGKILL] + made[SIGTERM]
    scene.figures.append(
        f"{total} cuts of {replies} replies, {restarts} with a server restart, "
        f"{made['replicas']} with a second replica{skipped}"
    )
