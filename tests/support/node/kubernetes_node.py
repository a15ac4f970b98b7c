"""A node of a Kubernetes cluster, on which pods run: kubelet, containerd, controller manager and scheduler."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.node.images import server_image
from tests.support.node.isolation import ADDRESS, isolated, remove_control_groups, unmount_below
from tests.support.node.runtime import Runtime, start_runtime
from tests.support.servers.kubernetes_client import KubernetesClient
from tests.support.servers.kubernetes_server import Cluster, program, running_cluster, start

NAME = "node"
PATH = f"/api/v1/nodes/{NAME}"
CONFIGURATION: dict[str, Any] = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "address": ADDRESS,
    "readOnlyPort": 0,
    "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
    "authorization": {"mode": "AlwaysAllow"},
    # Containers have their own control groups, which end with them; pods have none.
    "cgroupDriver": "cgroupfs",
    "cgroupsPerQOS": False,
    "enforceNodeAllocatable": [],
    "failSwapOn": False,
    "protectKernelDefaults": True,
    # A full disk of the machine must not evict pods or delete images.
    "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
    "imageGCHighThresholdPercent": 100,
    "imageGCLowThresholdPercent": 99,
}
UID = 65532  # of the server in the image
CONFIGURED_RUNTIME = (1, 27)  # the first version whose configuration has the runtime's address
ONE_RUNTIME = (1, 24)  # the first version without Docker's own runtime, the earlier default
CGROUP_V1_FIELD = (1, 31)  # the first version that can reject cgroup v1


@dataclass(frozen=True)
class Node:
    """A running node with the server's image."""

    cluster: Cluster
    folder: Path
    image: str

    @property
    def client(self) -> KubernetesClient:
        """The client of the API server."""
        return self.cluster.client

    @property
    def is_ready(self) -> bool:
        """Whether pods can run."""
        nodes = self.client.request("GET", "/api/v1/nodes")[0]["items"]
        conditions = [condition for node in nodes for condition in node["status"]["conditions"]]
        return any(found["type"] == "Ready" and found["status"] == "True" for found in conditions)

    @property
    def is_empty(self) -> bool:
        """Whether no pod is left."""
        return not self.client.request("GET", "/api/v1/pods")[0]["items"]

    def advertise(self, resource: str, count: int) -> None:
        """Set the number of devices of the node, as a device plugin does."""
        amounts = {resource: str(count)}
        self.client.request("PATCH", f"{PATH}/status", {"status": {"capacity": amounts, "allocatable": amounts}})

    def add_volume(self, name: str, path: Path, claim: tuple[str, str] | None = None) -> None:
        """Add a volume whose content is a folder; only a claim of this namespace and name may use it, if given."""
        spec: dict[str, Any] = {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
            "hostPath": {"path": str(path)},
        }
        if claim is not None:
            spec["claimRef"] = {"namespace": claim[0], "name": claim[1]}
        self.client.create({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})


@contextmanager
def running_node(assets: Path, folder: Path) -> Iterator[Node]:
    """Run a cluster with one node; skip the test if a program is missing, or outside of its own namespaces."""
    kubelet, manager, scheduler = (
        program(assets, name) for name in ("kubelet", "kube-controller-manager", "kube-scheduler")
    )
    archive, image = server_image(assets)
    with ExitStack() as stack:
        stack.enter_context(isolated(folder))
        stack.callback(remove_control_groups)
        stack.callback(unmount_below, folder)
        cluster = stack.enter_context(running_cluster(assets, folder))
        options = [f"--kubeconfig={cluster.kubeconfig}", "--leader-elect=false", "--secure-port=0"]
        start(stack, folder, [manager, *options, *manager_options(folder)])
        start(stack, folder, [scheduler, *options])
        runtime = start_runtime(stack, assets, folder)
        runtime.load(archive)
        process = start(stack, folder, kubelet_command(kubelet, cluster, runtime, folder))
        node = Node(cluster, folder, image)
        process.wait_until(lambda: node.is_ready)
        yield node
        # The kubelet ends the containers, which would outlive it.
        process.wait_until(lambda: node.is_empty)


def manager_options(folder: Path) -> list[str]:
    """Return additional options of the controller manager."""
    return [
        f"--cert-dir={folder / 'manager'}",
        f"--root-ca-file={folder / 'ca.pem'}",
        f"--service-account-private-key-file={folder / 'tls.key'}",
        # A busy machine reports late, which must not remove its pods from their Services.
        "--node-monitor-grace-period=10m",
    ]


def kubelet_command(kubelet: str, cluster: Cluster, runtime: Runtime, folder: Path) -> list[str]:
    """Return the command of the kubelet, and write its configuration."""
    document = dict(CONFIGURATION)
    flags = []
    if cluster.version >= CONFIGURED_RUNTIME:
        document["containerRuntimeEndpoint"] = runtime.endpoint
    else:
        flags.append(f"--container-runtime-endpoint={runtime.endpoint}")
    if cluster.version < ONE_RUNTIME:
        flags.append("--container-runtime=remote")
    if cluster.version >= CGROUP_V1_FIELD:
        document["failCgroupV1"] = False
    configuration = folder / "kubelet.json"
    configuration.write_text(json.dumps(document))
    return [
        kubelet,
        f"--config={configuration}",
        f"--kubeconfig={cluster.kubeconfig}",
        f"--root-dir={folder / 'kubelet'}",
        f"--cert-dir={folder / 'kubelet-certificates'}",
        f"--hostname-override={NAME}",
        f"--node-ip={ADDRESS}",
        *flags,
    ]
