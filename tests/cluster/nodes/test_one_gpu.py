"""An update on a node with one GPU: the pod drains, frees the GPU, and only then its successor starts and gets it.

The GPU is a device of the node's status, and the model runs on the CPU: the test is about the order and the drain.
"""

import asyncio
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.nodes.history import PodEvent, PodHistory
from tests.cluster.nodes.releases import DEMO, PORT, PodRelease, demo_card, demo_values, new_release, second
from tests.integration.usage.conftest import stored
from tests.support.checkpoints import edit_json
from tests.support.node.changed_chart import on_the_cpu
from tests.support.node.isolation import ADDRESS
from tests.support.node.kubernetes_node import Node
from tests.support.servers.name_server import running_name_server
from tests.support.servers.postgres_server import running_postgres

from llama2_client import Client
from llama2_client.errors import Unavailable
from llama2_server.usage.records import UsageRecord

GPU = "nvidia.com/gpu"
# A reply of seconds, so that one runs when the pod gets SIGTERM.
CONTEXT_LENGTH = 8192
MAX_TOKENS = 4000
PRE_STOP_SECONDS = 5  # drain.preStopSeconds of the chart
WORKLOADS: dict[str, dict[str, Any]] = {
    "StatefulSet": {"workload": "StatefulSet"},
    "Deployment with a claim (Recreate)": {"workload": "Deployment"},
    "Deployment with PostgreSQL (maxSurge 0)": {"workload": "Deployment", "usage": {"secret": "postgresql"}},
}


@dataclass
class Replies:
    """Long replies, one after another, also while no pod serves; each has ended as a whole or has not started."""

    stopping: bool = False
    finished: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    rejected: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def request(self, client: Client) -> None:
        """Request replies until `stopping` is set; a reply that ends after its first text fails the test."""
        while not self.stopping:
            stream = client.stream("Tell me a long story.", max_tokens=MAX_TOKENS)
            try:
                async for _ in stream:
                    self.progress.set()
            except Unavailable:
                assert not stream.text, "a reply was cut short"
                self.rejected += 1
            else:
                self.finished[stream.reply.request_id] = time.monotonic()
                self.seconds.append(stream.reply.total_time_seconds - stream.reply.queue_time_seconds)
            self.progress.set()

    async def wait_for_text(self) -> None:
        """Wait until a reply is in progress."""
        self.progress.clear()
        await self.progress.wait()

    async def wait_for_another(self) -> None:
        """Wait until one more reply has finished."""
        count = len(self.finished)
        while len(self.finished) == count:
            await self.wait_for_text()


def endless_model(folder: Path) -> Path:
    """Copy the demo model, with an end of sequence that it never generates, and with more positions."""
    copy = folder / "weights"
    shutil.copytree(DEMO, copy)
    edit_json(copy, "generation_config.json", eos_token_id=0)
    edit_json(copy, "config.json", max_position_embeddings=CONTEXT_LENGTH)
    return copy


async def update(release: PodRelease, values: dict[str, Any]) -> tuple[PodHistory, Replies]:
    """Upgrade the release while two clients always request a reply, of which one runs and one waits."""
    replies = Replies()
    with running_name_server(lookup=release.addresses) as names:
        async with Client(names.target(PORT), timeout=600) as client, asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(replies.request(client))
            await replies.wait_for_text()
            history = PodHistory(release)
            following = group.create_task(asyncio.to_thread(history.follow))
            await asyncio.to_thread(release.upgrade, values)
            await following
            await replies.wait_for_another()
            replies.stopping = True
    return history, replies


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workload", WORKLOADS)
async def test_the_new_pod_gets_the_gpu_of_the_old_one(node: Node, workload: str, tmp_path: Path) -> None:
    """The running reply finishes, the old pod ends with code 0, and then the new one is scheduled and gets ready."""
    node.advertise(GPU, 1)
    values = demo_values(node, demo_card(tmp_path, CONTEXT_LENGTH), **WORKLOADS[workload])
    with ExitStack() as stack:
        release = stack.enter_context(new_release(node, tmp_path, volumes=1, weights=endless_model(tmp_path)))
        usage_url = None
        if "usage" in values:
            usage_url = stack.enter_context(running_postgres(ADDRESS)).new_database()
            release.add_secret("postgresql", {"url": usage_url})
        release.changes.append(on_the_cpu)
        await asyncio.to_thread(release.install, values)
        history, replies = await update(release, second(values))
        await asyncio.to_thread(release.uninstall)
        records = await stored(usage_url, None if usage_url else release.data_folders()[0])
    check_order(history)
    print(figures(workload, history, replies))
    check_replies(history, replies, records)


def check_order(history: PodHistory) -> None:
    """Check that the old pod had ended before the new one got the GPU, and that no server had failed."""
    gone = history.first(lambda event: event.deleted, old=True)
    scheduled = history.first(lambda event: event.scheduled, old=False)
    assert history.events.index(gone) < history.events.index(scheduled)
    assert set().union(*(event.exit_codes for event in history.events if event.uid == history.old)) <= {0}
    assert history.events[-1].ready
    assert history.events[-1].uid != history.old


def check_replies(history: PodHistory, replies: Replies, records: list[UsageRecord]) -> None:
    """Check that a reply has finished after SIGTERM, and that each reply has one complete record."""
    signal_at = history.first(lambda event: event.stopping, old=True).at + PRE_STOP_SECONDS
    gone = history.first(lambda event: event.deleted, old=True)
    assert any(signal_at < finished_at < gone.at for finished_at in replies.finished.values())
    complete = [record.request_id for record in records if record.outcome in ("MAX_TOKENS", "END_OF_SEQUENCE")]
    assert sorted(complete) == sorted(replies.finished)
    assert {record.outcome for record in records} <= {"MAX_TOKENS", "END_OF_SEQUENCE", "UNAVAILABLE"}


def figures(workload: str, history: PodHistory, replies: Replies) -> str:
    """Return the seconds of the phases of an update."""
    stopping = history.first(lambda event: event.stopping, old=True)
    phases: dict[str, PodEvent] = {
        "old server ended": history.first(lambda event: event.exited, old=True),
        "old pod removed": history.first(lambda event: event.deleted, old=True),
        "new pod scheduled": history.first(lambda event: event.scheduled, old=False),
        "new server started": history.first(lambda event: event.running, old=False),
        "new pod ready": history.events[-1],
    }
    gone = phases["old pod removed"]
    last = max(at for at in replies.finished.values() if at < gone.at)
    length = sorted(replies.seconds)[len(replies.seconds) // 2]
    times = [f"{name} {event.at - stopping.at:.1f} s" for name, event in phases.items()]
    return (
        f"{workload}: a reply takes {length:.1f} s; the last one ended {last - stopping.at:.1f} s, "
        f"{', '.join(times)} after the request to delete the old pod"
    )
