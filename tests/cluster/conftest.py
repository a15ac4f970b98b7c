"""Fixtures of the tests with an API server."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helm_python
import pytest
from tests.cluster.namespaces import Namespace
from tests.helm.chart import Manifest
from tests.helm.test_validity import KUBERNETES
from tests.support.servers.cluster_assets import REASON, assets
from tests.support.servers.kubernetes_server import Cluster, running_cluster

# The strictest level of Pod Security: pods that violate it are rejected, and their workloads cause warnings.
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
# Objects of the operator that the value sets name.
PREREQUISITES: list[Manifest] = [
    {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "serving"}, "value": 1},
    {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"},
]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a running API server with the definitions of other projects; skip the test without one."""
    folder = assets()
    if folder is None:
        pytest.skip(REASON)
    with running_cluster(folder, tmp_path_factory.mktemp("cluster")) as cluster:
        oldest = tuple(int(part) for part in KUBERNETES[0].split("."))
        if cluster.version < oldest:
            pytest.skip(f"NOT TESTED WITH A CLUSTER: the chart needs Kubernetes {KUBERNETES[0]} or newer")
        for manifest in PREREQUISITES:
            cluster.client.create(manifest)
        yield cluster
    # Helm remembers the kinds of each address for hours, and another server may get the same port.
    cache = Path(os.environ.get("KUBECACHEDIR") or Path.home() / ".kube/cache")
    shutil.rmtree(cache / "discovery" / cluster.address.replace(":", "_"), ignore_errors=True)


@contextmanager
def new_namespace(cluster: Cluster, labels: dict[str, str]) -> Iterator[Namespace]:
    """Create a namespace with its default ServiceAccount, and uninstall the release at the end."""
    name = f"text-{uuid.uuid4().hex[:8]}"
    cluster.client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    account = {"name": "default", "namespace": name}
    cluster.client.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    with helm_python.Config(kubeconfig_path=cluster.kubeconfig, namespace=name, qps=1000, burst_limit=1000) as helm:
        try:
            yield Namespace(cluster, name, helm)
        finally:
            # Frees the ports of nodes, which namespaces share.
            helm.uninstall("llama2", ignore_not_found=True)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[Namespace]:
    """Return a new namespace whose Pod Security is `restricted`."""
    with new_namespace(cluster, RESTRICTED) as namespace:
        yield namespace


@pytest.fixture(scope="session")
def open_namespace(cluster: Cluster) -> Iterator[Namespace]:
    """Return a namespace without Pod Security, in which tests check values and install nothing."""
    with new_namespace(cluster, {}) as namespace:
        yield namespace
