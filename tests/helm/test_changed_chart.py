"""The changes with which tests/cluster/nodes runs on Kubernetes 1.20 affect only what that version does not have."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tests.helm.chart import NAMESPACE, Rendered, render, rendered, values_of
from tests.support.node.changed_chart import changed_chart, for_kubernetes_1_20, health_command, on_the_cpu

RELEASE = "llama2"
CHANGED = {
    "startupProbe",
    "readinessProbe",
    "livenessProbe",
    "lifecycle",
    "limits",
    "requests",
    "protocol",
    "persistentVolumeClaimRetentionPolicy",
    "unhealthyPodEvictionPolicy",
}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value that has no parts, with its path."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, str(index)))
    else:
        yield path, value


def changed(folder: Path, value_set: str) -> tuple[Rendered, set[tuple[str, ...]]]:
    """Return a changed release, and the paths of all values that differ from those of the chart."""
    changes = [for_kubernetes_1_20, on_the_cpu]
    files = changed_chart(folder, values_of(value_set), RELEASE, NAMESPACE, changes).render({}, name=RELEASE)
    files["llama2/templates/NOTES.txt"] = ""
    release = Rendered(files, merged={})
    old = {(found["kind"], found["metadata"]["name"]): found for found in rendered(value_set).manifests}
    new = {(found["kind"], found["metadata"]["name"]): found for found in release.manifests}
    assert set(old) == set(new)
    return release, {path for name in old for path, _ in set(leaves(old[name])) ^ set(leaves(new[name]))}


@pytest.mark.parametrize("value_set", ["per-replica", "production-gpu", "many-replicas"])
def test_other_fields_are_the_same(tmp_path: Path, value_set: str) -> None:
    """Probes, `sleep`, amounts, protocols and the version of the disruption budget differ, and the device."""
    release, paths = changed(tmp_path / "chart", value_set)
    rest = {path for path in paths if not CHANGED & set(path)}
    device = [path for path in rest if path[-1] == "value"]
    assert len(device) == (release.env["LLAMA2_DEVICE"] != render(values_of(value_set)).env["LLAMA2_DEVICE"])
    assert rest - set(device) == {("apiVersion",)}
    assert release.one("PodDisruptionBudget")["apiVersion"] == "policy/v1beta1"
    assert release.env["LLAMA2_DEVICE"] == "cpu"


def test_commands_replace_the_handlers_that_1_20_does_not_have(tmp_path: Path) -> None:
    """Each probe asks the same port for the same service, with the same times."""
    release, _ = changed(tmp_path / "chart", "per-replica")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        old = dict(rendered("per-replica").server[probe])
        rpc = old.pop("grpc")
        new = dict(release.server[probe])
        command = new.pop("exec")["command"]
        assert command == health_command(rpc["port"], rpc.get("service", ""))
        assert new == old
    assert release.server["lifecycle"] == {"preStop": {"exec": {"command": ["sleep", "5"]}}}


def test_the_health_command_is_a_health_check() -> None:
    """Its exit code is 0 only for a service that serves."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        commands = {service: [sys.executable, *health_command(port, service)[1:]] for service in ("liveness", "", "x")}
        codes = {service: subprocess.run(command, check=False).returncode for service, command in commands.items()}
        assert codes == {"liveness": 0, "": 1, "x": 1}
    finally:
        server.stop(None).wait()
