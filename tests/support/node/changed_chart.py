"""The chart with changed manifests, as Helm's post-renderers make it: for Kubernetes 1.20, and without a GPU."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import helm_python
import yaml
from tests.helm.chart import Manifest, Values, chart
from tests.support.node import health_check

Change = Callable[[Manifest], None]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def changed_chart(
    folder: Path, values: Values, release: str, namespace: str, changes: Sequence[Change]
) -> helm_python.Chart:
    """Render the chart, and return a chart without values whose manifests are the changed ones."""
    files = chart().render(values, name=release, namespace=namespace)
    files.pop("llama2/templates/NOTES.txt")
    manifests = [found for text in files.values() for found in yaml.safe_load_all(text) if found is not None]
    for manifest in manifests:
        for change in changes:
            change(manifest)
    (folder / "templates").mkdir(parents=True)
    metadata = {"apiVersion": "v2", "name": "llama2", "version": str(chart().version)}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(metadata))
    (folder / "manifests.yaml").write_text(yaml.safe_dump_all(manifests))
    # Not a template itself: a card or a script can have the delimiters of templates.
    (folder / "templates/all.yaml").write_text('{{ .Files.Get "manifests.yaml" }}')
    return helm_python.Chart.load(folder)


def containers(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the containers of a workload, and none of other manifests."""
    if manifest["kind"] not in ("Deployment", "StatefulSet"):
        return []
    found: list[dict[str, Any]] = manifest["spec"]["template"]["spec"]["containers"]
    return found


def for_kubernetes_1_20(manifest: Manifest) -> None:
    """Replace or remove what Kubernetes 1.20 does not have.

    - gRPC probes become a command that makes the same call, with the same periods, timeouts and thresholds.
    - `sleep` before SIGTERM becomes the program of that name in the image.
    - Version 1 of PodDisruptionBudgets becomes version 1beta1, without `unhealthyPodEvictionPolicy`.
    - `persistentVolumeClaimRetentionPolicy` is removed, because that version always keeps the claims.
    - Ports get their default protocol, and amounts become strings: its server-side apply requires both.
    """
    if manifest["kind"] == "PodDisruptionBudget":
        manifest["apiVersion"] = "policy/v1beta1"
        manifest["spec"].pop("unhealthyPodEvictionPolicy")
    manifest.get("spec", {}).pop("persistentVolumeClaimRetentionPolicy", None)
    if manifest["kind"] == "Service":
        set_protocol(manifest["spec"]["ports"])
    for container in containers(manifest):
        set_protocol(container["ports"])
        container["resources"] = {
            kind: {name: str(amount) for name, amount in amounts.items()}
            for kind, amounts in container["resources"].items()
        }
        for probe in (container[name] for name in PROBES if name in container):
            grpc = probe.pop("grpc")
            probe["exec"] = {"command": health_command(grpc["port"], grpc.get("service", ""))}
        if "lifecycle" in container:
            seconds = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            container["lifecycle"]["preStop"] = {"exec": {"command": ["sleep", str(seconds)]}}


def health_command(port: int, service: str) -> list[str]:
    """Return a command for the image that calls its health service as a gRPC probe does."""
    code = Path(health_check.__file__).read_text(encoding="utf-8")
    return ["python", "-I", "-S", "-c", code, str(port), service]


def set_protocol(ports: list[Manifest]) -> None:
    """Write the default protocol of ports."""
    for port in ports:
        port.setdefault("protocol", "TCP")


def on_the_cpu(manifest: Manifest) -> None:
    """Run the model on the CPU in a pod that reserves a GPU."""
    for container in containers(manifest):
        for variable in container["env"]:
            if variable["name"] == "LLAMA2_DEVICE":
                variable["value"] = "cpu"
