"""The life of the pods of a namespace, from the events of the API server in their order."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.cluster.nodes.releases import WAIT_SECONDS, PodRelease
from tests.helm.chart import Manifest


@dataclass(frozen=True)
class PodEvent:
    """A change of a pod, and when it arrived (monotonic)."""

    at: float
    kind: str
    pod: Manifest

    @property
    def uid(self) -> str:
        """The pod's identity; a StatefulSet gives its pods the same name again."""
        return str(self.pod["metadata"]["uid"])

    @property
    def deleted(self) -> bool:
        """Whether the pod has ended and its devices are free."""
        return self.kind == "DELETED"

    @property
    def stopping(self) -> bool:
        """Whether the pod's deletion was requested."""
        return "deletionTimestamp" in self.pod["metadata"]

    @property
    def scheduled(self) -> bool:
        """Whether the pod has a node."""
        return "nodeName" in self.pod["spec"]

    @property
    def running(self) -> bool:
        """Whether the server's container has started."""
        return any("running" in found["state"] for found in self.pod["status"].get("containerStatuses", []))

    @property
    def exit_codes(self) -> set[int]:
        """The exit codes of the containers that have ended."""
        statuses = self.pod["status"].get("containerStatuses", [])
        return {found["state"]["terminated"]["exitCode"] for found in statuses if "terminated" in found["state"]}

    @property
    def exited(self) -> bool:
        """Whether the server has ended; the kubelet may report it together with the end of the pod."""
        return bool(self.exit_codes) or self.deleted

    @property
    def ready(self) -> bool:
        """Whether the pod is ready."""
        conditions = self.pod["status"].get("conditions", [])
        return any(found["type"] == "Ready" and found["status"] == "True" for found in conditions)


@dataclass
class PodHistory:
    """The events of an update from one pod to another."""

    release: PodRelease
    old: str = ""
    version: str = ""
    events: list[PodEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        path = self.release.node.client.collection("v1", "Pod", self.release.namespace)
        listed = self.release.node.client.request("GET", path)[0]
        (pod,) = listed["items"]
        self.old, self.version = pod["metadata"]["uid"], listed["metadata"]["resourceVersion"]

    def follow(self) -> None:
        """Collect the events until another pod is ready, or an update that hangs has failed."""
        client = self.release.node.client
        path = client.collection("v1", "Pod", self.release.namespace)
        for kind, pod in client.watch(path, self.version, WAIT_SECONDS):
            event = PodEvent(time.monotonic(), kind, pod)
            self.events.append(event)
            if event.uid != self.old and event.ready:
                return

    def first(self, condition: Callable[[PodEvent], bool], *, old: bool) -> PodEvent:
        """Return the first event of the old or the new pod for which a condition holds."""
        return next(event for event in self.events if (event.uid == self.old) == old and condition(event))
