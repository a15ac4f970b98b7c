"""A release of the chart whose pods run on a node."""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helm_python
import yaml
from tests.helm.chart import Manifest, Values, chart
from tests.helm.test_validity import KUBERNETES
from tests.support.node.changed_chart import Change, changed_chart, for_kubernetes_1_20
from tests.support.node.kubernetes_node import UID, Node
from tests.support.processes import card_file
from tests.support.repository import ROOT

RELEASE = "llama2"
WAIT_SECONDS = 1200  # only ends an update that hangs
PORT = 50051
DEMO = ROOT / "server/llama2_server/demo"
OLDEST = tuple(int(part) for part in KUBERNETES[0].split("."))


@dataclass(frozen=True)
class PodRelease:
    """A release in a namespace, with volumes for the weights and the data of its pods."""

    node: Node
    namespace: str
    helm: helm_python.Config
    folder: Path
    changes: list[Change] = field(default_factory=list)

    def install(self, values: Values) -> None:
        """Install the chart, and wait until its pods are ready."""
        self.helm.install(*self._chart(values), namespace=self.namespace, wait="watcher", timeout=WAIT_SECONDS)

    def upgrade(self, values: Values) -> None:
        """Upgrade the release, and wait until the new pods are ready."""
        self.helm.upgrade(*self._chart(values), namespace=self.namespace, wait="watcher", timeout=WAIT_SECONDS)

    def roll_back(self) -> None:
        """Restore the previous revision, and wait until its pods are ready."""
        self.helm.rollback(RELEASE, wait="watcher", timeout=WAIT_SECONDS)

    def uninstall(self) -> None:
        """Remove the release, and wait until its pods have drained and ended, which Helm does not."""
        self.helm.uninstall(RELEASE, ignore_not_found=True, wait="watcher", timeout=WAIT_SECONDS)
        path = self.node.client.collection("v1", "Pod", self.namespace)
        listed = self.node.client.request("GET", path)[0]
        left = {pod["metadata"]["uid"] for pod in listed["items"]}
        changes = self.node.client.watch(path, listed["metadata"]["resourceVersion"], WAIT_SECONDS)
        while left:
            kind, pod = next(changes)
            if kind == "DELETED":
                left.discard(pod["metadata"]["uid"])

    def pods(self) -> list[Manifest]:
        """Return the server's pods."""
        return self.node.client.list("v1", "Pod", self.namespace)

    def addresses(self) -> list[str]:
        """Return the addresses of the ready pods, as the DNS of a cluster does for the headless Service."""
        path = f"{self.node.client.collection('v1', 'Endpoints', self.namespace)}/{RELEASE}-headless"
        subsets = self.node.client.request("GET", path)[0].get("subsets", [])
        return [entry["ip"] for subset in subsets for entry in subset.get("addresses", [])]

    def add_secret(self, name: str, content: dict[str, str]) -> None:
        """Create a Secret."""
        metadata = {"name": name, "namespace": self.namespace}
        self.node.client.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": content})

    def data_folders(self) -> list[Path]:
        """Return the volumes that a pod has used for its data."""
        return sorted(path.parent for path in self.folder.glob("data-*/usage.db"))

    def _chart(self, values: Values) -> tuple[Any, str, Values]:
        """Return the chart for this cluster, the release's name, and the values."""
        old = self.node.cluster.version < OLDEST
        changes: Sequence[Change] = [*self.changes, *([for_kubernetes_1_20] if old else [])]
        if not changes:
            return chart(), RELEASE, values
        folder = self.folder / f"chart-{uuid.uuid4().hex[:8]}"
        return changed_chart(folder, values, RELEASE, self.namespace, changes), RELEASE, {}


@contextmanager
def new_release(node: Node, folder: Path, *, volumes: int, weights: Path = DEMO) -> Iterator[PodRelease]:
    """Create a namespace with volumes for the weights and for data, and uninstall its release at the end."""
    name = f"text-{uuid.uuid4().hex[:8]}"
    node.client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    node.add_volume(f"{name}-weights", weights, claim=(name, "weights"))
    node.client.create(weights_claim(name))
    for number in range(volumes):
        data = folder / f"data-{number}"
        data.mkdir()
        os.chown(data, UID, UID)
        node.add_volume(f"{name}-data-{number}", data)
    with helm_python.Config(
        kubeconfig_path=node.cluster.kubeconfig, namespace=name, qps=1000, burst_limit=1000
    ) as helm:
        release = PodRelease(node, name, helm, folder)
        try:
            yield release
        finally:
            release.uninstall()


def weights_claim(namespace: str) -> Manifest:
    """Return the claim of the volume with the demo model's weights."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights", "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


def demo_card(folder: Path, context_length: int) -> str:
    """Return the demo model's card without quotas and cache, with this limit of tokens."""
    path = card_file(folder, max_requests_per_min={"default": 10**6}, infer_response_cache=None)
    document = yaml.safe_load(path.read_text())
    for entry in document["model"]["properties"]:
        if entry["property_id"] in ("context_length_limit", "sequence_length_limit"):
            entry["value"] = str(context_length)
    return yaml.safe_dump(document)


def demo_values(node: Node, card: str, **others: Any) -> Values:
    """Return the values of servers with a card and the weights in the claim."""
    repository, _, tag = node.image.rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "card": {"content": card},
        "weights": {"existingClaim": "weights"},
        "allowUnauthenticated": True,
        "settings": {"max_free_calls_per_minute": 10**9},
        "data": {"storageClass": "-"},
        # Small, so that the pods of an update fit on any node.
        "resources": {"requests": {"cpu": "10m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
        **others,
    }


def second(values: Values) -> Values:
    """Return the values of an update: the pods differ from the first ones in an annotation."""
    return values | {"podAnnotations": {"revision": "second"}}
