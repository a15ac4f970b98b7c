"""`examples/kserve`: the pod that KServe combines from both manifests is valid, equals the chart's, and serves."""

import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.helm.chart import rendered
from tests.support.processes import command, environment
from tests.support.repository import ROOT
from tests.support.servers.cluster_assets import schema_of

from llama2_client import SyncClient
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.lifecycle.checks.checkpoint import demo_checkpoint

MANIFESTS = [
    yaml.safe_load((ROOT / "examples/kserve" / name).read_text(encoding="utf-8"))
    for name in ("clusterservingruntime.yaml", "inferenceservice.yaml")
]
RUNTIME, SERVICE = (manifest["spec"] for manifest in MANIFESTS)
# The fields of a predictor that are not fields of a pod.
PREDICTOR = {"minReplicas", "maxReplicas", "model"}
MODEL = {"modelFormat", "runtime", "storageUri"}


def merged(first: list[dict[str, Any]], second: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return both lists as a strategic merge does: an item of the second replaces one with an equal key."""
    items = {item[key]: item for item in (*first, *second)}
    return list(items.values())


def pod_spec() -> dict[str, Any]:
    """Return the pod's spec that KServe makes of the runtime and the service."""
    predictor = SERVICE["predictor"]
    (container,) = RUNTIME["containers"]
    model = {key: value for key, value in predictor["model"].items() if key not in MODEL}
    lists = {"env": "name", "volumeMounts": "mountPath"}
    container = container | model | {key: merged(container[key], model[key], name) for key, name in lists.items()}
    volumes = merged(RUNTIME["volumes"], predictor["volumes"], "name")
    rest = {key: value for key, value in predictor.items() if key not in PREDICTOR}
    return rest | {"containers": [container], "volumes": volumes}


def test_the_combined_pod_is_valid() -> None:
    """The pod is strictly valid for Kubernetes; its mounts exist; the runtime and the format are each other's."""
    pod = pod_spec()
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "llama2"}, "spec": pod}
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    (container,) = pod["containers"]
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert [mount["name"] for mount in container["volumeMounts"]] == volumes
    model = SERVICE["predictor"]["model"]
    assert model["runtime"] == MANIFESTS[0]["metadata"]["name"]
    assert model["modelFormat"]["name"] in {known["name"] for known in RUNTIME["supportedModelFormats"]}


def test_the_pod_equals_the_chart() -> None:
    """Settings, probes, memory, grace and security are the chart's for the same model; only the paths differ."""
    chart, pod = rendered("production-gpu"), pod_spec()
    (server, (container,)) = (chart.server, pod["containers"])
    expected = {name: value for name, value in chart.env.items() if isinstance(value, str)}
    settings = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    # The chart mounts its card, has TLS in these values, sets the default queue time, and downloads the weights.
    other = ("LLAMA2_CARD", "LLAMA2_WEIGHTS", "LLAMA2_QUEUE", "LLAMA2_TLS")
    assert {name: settings[name] for name in settings if not name.startswith(other)} == {
        name: expected[name] for name in expected if not name.startswith(other)
    }
    for field in ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle"):
        assert container[field] == server[field]
    assert container["resources"]["limits"] == {
        name: str(amount) for name, amount in server["resources"]["limits"].items()
    }
    assert pod["terminationGracePeriodSeconds"] == chart.pod["spec"]["terminationGracePeriodSeconds"]
    security = chart.pod["spec"]["securityContext"] | server["securityContext"]
    assert pod["securityContext"] | container["securityContext"] == security
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {port["name"]: port["containerPort"] for port in server["ports"]}


@pytest.mark.timeout(600)
def test_the_container_serves_the_mounted_checkpoint(tmp_path: Path) -> None:
    """The pod's settings start a server with the checkpoint that KServe mounts; a key of the Secret may call."""
    (container,) = pod_spec()["containers"]
    key, line = new_key("42")
    (tmp_path / "keys.yaml").write_text(f"keys:\n  {line}\n")
    settings = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    local = {"/mnt/models": demo_checkpoint(), "/data": tmp_path, "/etc/llama2/keys/keys.yaml": tmp_path / "keys.yaml"}
    settings = {name: str(local.get(value, value)) for name, value in settings.items()}
    settings |= {name: "127.0.0.1:0" for name in settings if name.endswith("LISTEN")}
    settings |= {"LLAMA2_CARD": "demo", "LLAMA2_DEVICE": "cpu"}  # the demo's checkpoint, without a GPU
    with subprocess.Popen(
        command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**settings)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        serving = re.match(r"SERVING on (\S+)\.", process.stdout.readline())
        try:
            assert serving, process.stderr.read()
            with SyncClient(serving[1], api_key=key) as client:
                assert client.generate("a story", max_tokens=4).text
        finally:
            process.kill()


def test_the_manifests_match_the_definitions_of_kserve() -> None:
    """Both manifests are strictly valid by KServe's CustomResourceDefinitions."""
    for manifest in MANIFESTS:
        jsonschema.Draft202012Validator(schema_of(manifest)).validate(manifest)
