"""`helm upgrade` and `helm rollback` of two replicas under load: no call fails, and each reply has one usage record."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cluster.nodes.releases import PORT, PodRelease, demo_card, demo_values, new_release, second
from tests.integration.usage.conftest import stored
from tests.reliability.test_rolling_restart import CALLS_BETWEEN, Load, check_records, running_load
from tests.support.node.isolation import ADDRESS
from tests.support.node.kubernetes_node import Node
from tests.support.servers.name_server import running_name_server
from tests.support.servers.postgres_server import running_postgres

REPLICAS = 2
CONTEXT_LENGTH = 1024


async def update(release: PodRelease, load: Load, name: str, change: Callable[[], None]) -> None:
    """Update the release under load, and check that Helm has replaced each pod and that none was restarted."""
    await load.wait_for(CALLS_BETWEEN)
    before = {pod["metadata"]["uid"] for pod in release.pods()}
    calls = len(load.request_ids) + load.counted
    started_at = asyncio.get_running_loop().time()
    await asyncio.to_thread(change)
    seconds = asyncio.get_running_loop().time() - started_at
    print(f"{name}: {seconds:.1f} s, {len(load.request_ids) + load.counted - calls} calls")
    await load.wait_for(CALLS_BETWEEN)
    pods = [pod for pod in release.pods() if "deletionTimestamp" not in pod["metadata"]]
    assert len(pods) == REPLICAS
    assert not before & {pod["metadata"]["uid"] for pod in pods}
    assert [status["restartCount"] for pod in pods for status in pod["status"]["containerStatuses"]] == [0] * REPLICAS


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workload", ["StatefulSet", "Deployment"])
async def test_no_call_fails_in_an_upgrade_and_a_rollback(node: Node, workload: str, tmp_path: Path) -> None:
    """Six clients make calls of three RPCs, and balance them over the addresses of the headless Service."""
    values = demo_values(
        node,
        demo_card(tmp_path, CONTEXT_LENGTH),
        workload=workload,
        replicas=REPLICAS,
        gpu={"count": 0},
        quotas="perReplica",
        usage={"secret": "postgresql"},
    )
    with running_postgres(ADDRESS) as postgres, new_release(node, tmp_path, volumes=REPLICAS) as release:
        usage_url = postgres.new_database()
        release.add_secret("postgresql", {"url": usage_url})
        await asyncio.to_thread(release.install, values)
        with running_name_server(lookup=release.addresses) as names:
            async with running_load(names.target(PORT)) as load:
                await update(release, load, "upgrade", lambda: release.upgrade(second(values)))
                await update(release, load, "rollback", release.roll_back)
        await asyncio.to_thread(release.uninstall)
        check_records(await stored(usage_url), load)
        print(f"{workload}: {len(load.request_ids)} replies, {load.counted} counts")
