"""A namespace of the test cluster, with Helm."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import helm_python
import pytest
import yaml
from tests.helm.chart import Manifest, Rendered, Values, chart
from tests.support.servers.kubernetes_client import KubernetesClient
from tests.support.servers.kubernetes_server import Cluster

RELEASE = "llama2"
IMAGE_VOLUMES = (1, 35)  # the first version that enables them by default
# Fields that the server sets, and that differ between two equal objects.
OWN_METADATA = {"creationTimestamp", "generation", "managedFields", "resourceVersion", "uid"}
OWN_SPEC = {"clusterIP", "clusterIPs"}


@dataclass(frozen=True)
class Namespace:
    """A namespace, in which Helm installs the chart."""

    cluster: Cluster
    name: str
    helm: helm_python.Config

    @property
    def client(self) -> KubernetesClient:
        """The client of the API server."""
        return self.cluster.client

    def install(self, values: Values, release: str = RELEASE, **options: Any) -> list[Manifest]:
        """Install the chart, and return the manifests without hooks."""
        return manifests_of(self.helm.install(chart(), release, values, namespace=self.name, **options))

    def upgrade(self, values: Values, **options: Any) -> list[Manifest]:
        """Upgrade the release to other values, and return the manifests without hooks."""
        return manifests_of(self.helm.upgrade(chart(), RELEASE, values, namespace=self.name, **options))

    def hooks(self) -> list[Manifest]:
        """Return the manifests of the release's hooks, such as the pod of `helm test`."""
        return [yaml.safe_load(hook["manifest"]) for hook in self.helm.get_all(RELEASE)["hooks"] or []]

    def get(self, api_version: str, kind: str, name: str) -> Manifest:
        """Return an object."""
        return self.client.request("GET", f"{self.client.collection(api_version, kind, self.name)}/{name}")[0]

    def claims(self) -> dict[str, bool]:
        """Return each claim, and whether it is kept, not deleted."""
        found = self.client.list("v1", "PersistentVolumeClaim", self.name)
        return {claim["metadata"]["name"]: "deletionTimestamp" not in claim["metadata"] for claim in found}

    def finish_deletions(self) -> None:
        """Let deleted claims disappear, as the controller manager does if no pod uses them."""
        path = self.client.collection("v1", "PersistentVolumeClaim", self.name)
        for name, kept in self.claims().items():
            if not kept:
                self.client.request("PATCH", f"{path}/{name}", {"metadata": {"finalizers": None}})

    def objects(self, kinds: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Manifest]:
        """Return the release's objects of these API versions and kinds, without fields that the server sets."""
        selector = {"labelSelector": f"app.kubernetes.io/instance={RELEASE}"}
        found: dict[tuple[str, str], Manifest] = {}
        for api_version, kind in sorted(kinds):
            for item in self.client.list(api_version, kind, self.name, **selector):
                item.pop("status", None)
                item["metadata"] = {key: value for key, value in item["metadata"].items() if key not in OWN_METADATA}
                for field in OWN_SPEC:
                    item.get("spec", {}).pop(field, None)
                found[kind, item["metadata"]["name"]] = with_sorted_environments(item)
        return found


def with_sorted_environments(value: Any) -> Any:
    """Return a part of an object with sorted variables, which an upgrade merges by name into the existing ones."""
    if isinstance(value, dict):
        parts = {key: with_sorted_environments(part) for key, part in value.items()}
        if isinstance(parts.get("env"), list):
            parts["env"].sort(key=itemgetter("name"))
        return parts
    return [with_sorted_environments(part) for part in value] if isinstance(value, list) else value


def manifests_of(release: Manifest) -> list[Manifest]:
    """Return the manifests of a release."""
    return [manifest for manifest in yaml.safe_load_all(release["manifest"]) if manifest is not None]


def missing(cluster: Cluster, release: Rendered) -> list[str]:
    """Return what the cluster lacks for a release: kinds of other projects, or image volumes."""
    kinds = {
        f"{manifest['kind']} of {manifest['apiVersion']}"
        for manifest in release.manifests
        if not cluster.client.serves(manifest)
    }
    if release.values["weights"]["image"]["reference"] and cluster.version < IMAGE_VOLUMES:
        kinds.add("image volumes (Kubernetes 1.35)")
    return sorted(kinds)


def skip_unless_served(cluster: Cluster, release: Rendered) -> None:
    """Skip the test with the reason if the cluster lacks something that a release has."""
    if lacks := missing(cluster, release):
        pytest.skip(f"NOT TESTED WITH A CLUSTER: the cluster has no {', no '.join(lacks)}")
