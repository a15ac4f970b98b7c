"""A real API server accepts the chart: each value set, with Pod Security "restricted" and without a warning."""

from typing import Any

import pytest
import yaml
from tests.cluster.namespaces import RELEASE, Namespace, skip_unless_served
from tests.helm.chart import VALUE_SETS, Manifest, Rendered, render, rendered, values_of, volumes_of
from tests.support.repository import ROOT
from tests.support.servers.kubernetes_client import RejectedByServer

Warnings = dict[str, list[str]]


def warnings_of(namespace: Namespace, manifests: list[Manifest]) -> Warnings:
    """Send manifests with strict validation to a dry run, and return the warnings by manifest."""
    answers = {
        f"{found['kind']} {found['metadata']['name']}": namespace.client.create(found, dry_run=True)
        for found in manifests
    }
    return {name: warnings for name, warnings in answers.items() if warnings}


def pods_of(release: Rendered, namespace: str) -> list[Manifest]:
    """Return the pods that controllers would create, each with the claims that a StatefulSet would create for it."""
    pods = []
    for number, template in enumerate(release.pods()):
        volumes: list[dict[str, Any]] = [
            {"name": volume["name"], "persistentVolumeClaim": {"claimName": f"{volume['name']}-{RELEASE}-0"}}
            if "claimTemplate" in volume
            else volume
            for volume in volumes_of(release, template)
        ]
        metadata = template.get("metadata", {}) | {"name": f"pod-{number}", "namespace": namespace}
        spec = template["spec"] | {"volumes": volumes}
        pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    return pods


@pytest.mark.timeout(600)
@pytest.mark.parametrize("value_set", VALUE_SETS)
def test_the_server_accepts_the_value_set(namespace: Namespace, value_set: str) -> None:
    """`helm install` succeeds, first as a dry run; the server accepts manifests, hooks and pods without warnings."""
    values, release = values_of(value_set), rendered(value_set)
    skip_unless_served(namespace.cluster, release)
    manifests = namespace.install(values, dry_run="server")
    assert len(manifests) == len(release.manifests) - len(release.test_pods)
    assert warnings_of(namespace, manifests) == {}
    assert namespace.install(values) == manifests
    for manifest in manifests:
        found = namespace.get(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        assert found["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
    # The ServiceAccount of the pods exists now.
    assert warnings_of(namespace, namespace.hooks()) == {}
    assert warnings_of(namespace, pods_of(release, namespace.name)) == {}


def test_violations_are_found(namespace: Namespace) -> None:
    """The same checks find a pod that Pod Security forbids, and an unknown field."""
    values = values_of("demo") | {"containerSecurityContext": {"allowPrivilegeEscalation": True}}
    (workload,) = (found for found in namespace.install(values, dry_run="server") if found["kind"] == "Deployment")
    (warnings,) = warnings_of(namespace, [workload]).values()
    assert any("would violate PodSecurity" in warning for warning in warnings)
    # The pod of `helm test` has the same security context, and needs the ServiceAccount.
    namespace.install(values)
    with pytest.raises(RejectedByServer, match="violates PodSecurity"):
        warnings_of(namespace, pods_of(render(values), namespace.name))
    workload["spec"]["replica"] = 2
    with pytest.raises(RejectedByServer, match=r'unknown field "spec\.replica"'):
        warnings_of(namespace, [workload])


def test_the_server_accepts_the_example_for_kserve(namespace: Namespace) -> None:
    """With KServe's definitions, the server accepts both manifests of `examples/kserve` without warnings."""
    manifests = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "examples/kserve").glob("*.yaml"))]
    assert len(manifests) == 2
    if not all(namespace.client.serves(manifest) for manifest in manifests):
        pytest.skip("NOT TESTED WITH A CLUSTER: the cluster has no definitions of KServe")
    (service,) = (manifest for manifest in manifests if manifest["kind"] == "InferenceService")
    service["metadata"]["namespace"] = namespace.name
    assert warnings_of(namespace, manifests) == {}
