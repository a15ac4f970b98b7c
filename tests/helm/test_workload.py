"""Settings, shutdown times, scheduling and updates of the server's pods."""

import helm_python
import pytest
from tests.helm.chart import Rendered, card_of, containers_of, render, rendered, settings_of, values_of
from tools.chart import CHART

from llama2_server.config.settings import Settings
from llama2_server.lifecycle.drain import ENGINE_STOP_TIMEOUT_SECONDS
from llama2_server.usage.ledger import CLOSE_TIMEOUT_SECONDS


def test_the_environment_is_valid_settings(release: Rendered) -> None:
    """Each LLAMA2_ variable is a setting with a valid value, and the combination is valid."""
    urls = {"LLAMA2_REDIS_URL": "redis://r", "LLAMA2_USAGE_URL": "postgresql://u:p@h/d"}
    settings = settings_of(release, urls)
    given = {name.removeprefix("LLAMA2_").lower() for name in release.env if name.startswith("LLAMA2_")}
    assert given <= set(Settings.model_fields)
    assert given == settings.model_fields_set
    for name, value in release.values["settings"].items():
        assert getattr(settings, name) == value
    assert settings.allow_unauthenticated is (not release.values["apiKeys"]["secret"])
    assert (settings.redis_url is not None) is bool(release.values["redis"]["secret"])
    assert (settings.usage_url is not None) is bool(release.values["usage"]["secret"])
    assert (settings.device == "cuda") is any(
        release.values["gpu"]["resource"] in limits for limits in [release.server["resources"]["limits"]]
    )


def test_the_pod_waits_for_the_longest_generation(release: Rendered) -> None:
    """The shutdown grace covers the card's longest generation; Kubernetes adds preStop and the flush."""
    values, spec = release.values, release.pod["spec"]
    max_seconds = card_of(release).context_length_limit * values["slowestTokenSeconds"]
    grace = float(release.env["LLAMA2_SHUTDOWN_GRACE_SECONDS"])
    assert max_seconds <= grace < max_seconds + 1
    pre_stop = release.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert pre_stop == values["drain"]["preStopSeconds"]
    flush = spec["terminationGracePeriodSeconds"] - pre_stop - grace
    assert flush == values["drain"]["flushSeconds"]
    assert flush >= ENGINE_STOP_TIMEOUT_SECONDS + CLOSE_TIMEOUT_SECONDS


def test_the_connection_grace_covers_queue_and_generation(release: Rendered) -> None:
    """The last call of an old connection may wait in the queue and then generate for the maximum time."""
    settings = settings_of(release)
    max_seconds = card_of(release).context_length_limit * release.values["slowestTokenSeconds"]
    assert settings.max_connection_age_grace_seconds > settings.queue_timeout_seconds + max_seconds
    for pod in release.test_pods:
        (timeout,) = (argument for argument in containers_of(pod)[0]["args"] if argument.startswith("--timeout="))
        assert float(timeout.removeprefix("--timeout=")) > settings.queue_timeout_seconds + max_seconds


def test_all_containers_use_one_image(release: Rendered) -> None:
    """Server, init container, Jobs and test use one image, by digest, else by tag, else by the chart's appVersion."""
    image = release.values["image"]
    version = image["tag"] or helm_python.Chart.load(CHART).metadata["appVersion"]
    expected = f"{image['repository']}@{image['digest']}" if image["digest"] else f"{image['repository']}:{version}"
    pods = [pod for pod in release.pods() if pod not in release.envoys]
    assert {container["image"] for pod in pods for container in containers_of(pod)} == {expected}


def test_the_gpu_is_requested_and_its_taint_tolerated(release: Rendered) -> None:
    """The 7B requests one GPU; the demo and `gpu.count: 0` request none."""
    gpus = 0 if release.values["demo"] or release.values["gpu"].get("count") == 0 else 1
    resource = release.values["gpu"]["resource"]
    assert release.server["resources"]["limits"].get(resource, 0) == gpus
    tolerations = release.pod["spec"].get("tolerations", [])
    assert tolerations[gpus:] == release.values["tolerations"]
    assert tolerations[:gpus] == [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}] * gpus
    for init in release.pod["spec"].get("initContainers", []):
        assert resource not in init["resources"]["limits"]


def test_scheduling_values_reach_the_pod() -> None:
    """Node selector, affinity, priority, runtime class, pull secrets, annotations and labels reach the pod."""
    values, pod = rendered("everything-on").values, rendered("everything-on").pod
    for name in ("nodeSelector", "affinity", "priorityClassName", "runtimeClassName"):
        assert pod["spec"][name] == values[name]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["metadata"]["annotations"]["example.com/team"] == "text"
    assert pod["metadata"]["labels"]["example.com/cost-centre"] == "42"
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "server"


def test_replicas_are_spread_and_scaled(release: Rendered) -> None:
    """Several replicas are spread; with autoscaling, the Deployment does not set their number."""
    values, spec = release.values, release.workload["spec"]
    autoscaled = values["autoscaling"]["enabled"]
    assert spec.get("replicas") == (None if autoscaled else values["replicas"])
    several = max(values["autoscaling"]["maxReplicas"] if autoscaled else values["replicas"], 1) > 1
    spread = release.pod["spec"].get("topologySpreadConstraints", [])
    assert [constraint["topologyKey"] for constraint in spread] == (
        [constraint["topologyKey"] for constraint in values["topologySpread"]] if several else []
    )
    for scaler in release.of("ScaledObject"):
        target = {"kind": release.workload["kind"], "name": release.workload["metadata"]["name"]}
        assert scaler["spec"]["scaleTargetRef"] == target
        assert scaler["spec"]["minReplicaCount"] == values["autoscaling"]["minReplicas"]
        assert scaler["spec"]["maxReplicaCount"] == values["autoscaling"]["maxReplicas"]
        (trigger,) = scaler["spec"]["triggers"]
        assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
        # KEDA accepts strings only.
        assert trigger["metadata"]["threshold"] == str(values["autoscaling"]["utilization"])
        # A missing value is an error, so that KEDA does not scale down when the scrape fails.
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert scaler["spec"]["fallback"]["replicas"] == values["autoscaling"]["maxReplicas"]
        assert trigger["metadata"]["serverAddress"] == values["autoscaling"]["prometheus"]
    assert bool(release.of("ScaledObject")) is autoscaled


def test_single_pod_volumes_recreate_the_pod(release: Rendered) -> None:
    """With a rolling update of a Deployment, the new pod would wait forever for the volume that the old pod mounts."""
    spec = release.workload["spec"]
    if release.workload["kind"] == "StatefulSet":
        assert spec["updateStrategy"] == {"type": "RollingUpdate"}  # stops a pod before it starts the next one
        return
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in release.pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    if single_pod_claims(release) & claims:
        assert spec["strategy"] == {"type": "Recreate"}
    else:
        # A surge would wait forever for a GPU that the old pod still holds.
        gpu = "LLAMA2_DEVICE" in release.env and release.env["LLAMA2_DEVICE"] == "cuda"
        amounts = {"maxSurge": 0, "maxUnavailable": 1} if gpu else {"maxSurge": 1, "maxUnavailable": 0}
        given = {key: value for key, value in release.values["rollingUpdate"].items() if value is not None}
        assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": amounts | given}


def single_pod_claims(release: Rendered) -> set[str]:
    """Return the names of the claims that only one pod can mount."""
    created = {
        claim["metadata"]["name"]
        for claim in release.of("PersistentVolumeClaim")
        if claim["spec"]["accessModes"] != ["ReadWriteMany"]
    }
    return created | ({release.values["data"]["existingClaim"]} - {""})


@pytest.mark.parametrize(
    ("value_set", "kind"),
    [
        ("demo", "Deployment"),
        ("per-replica", "Deployment"),
        ("everything-on", "Deployment"),  # workload: Deployment
        ("production-gpu", "StatefulSet"),
        ("many-replicas", "StatefulSet"),
        ("autoscaled", "StatefulSet"),
    ],
)
def test_the_kind_depends_on_what_the_data_volume_holds(value_set: str, kind: str) -> None:
    """Billed usage is on a StatefulSet's volumes; the number of replicas does not change the kind."""
    assert rendered(value_set).workload["kind"] == kind
    assert render(values_of(value_set) | {"replicas": 1}).workload["kind"] == kind


def test_each_replica_keeps_its_data_volume(release: Rendered) -> None:
    """A StatefulSet has a claim per pod, which scale-downs and uninstalls retain, and starts all pods at once."""
    if release.workload["kind"] != "StatefulSet":
        return
    spec = release.workload["spec"]
    assert spec["serviceName"] in {service["metadata"]["name"] for service, _ in release.services()}
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    existing = release.values["data"]["existingClaim"]
    templates = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
    assert templates == ([] if existing else ["data"])
    assert {"name": "data", "mountPath": "/data"} in release.server["volumeMounts"]


def test_a_surge_needs_a_deployment() -> None:
    """A StatefulSet cannot start a new pod first; the values say so instead of being ignored."""
    values = values_of("many-replicas") | {"rollingUpdate": {"maxSurge": 1}}
    with pytest.raises(helm_python.HelmError, match="rollingUpdate: a StatefulSet replaces its pods one by one"):
        render(values)
    surge = render(values | {"workload": "Deployment", "gpu": {"count": 0}}).workload["spec"]["strategy"]
    assert surge["rollingUpdate"]["maxSurge"] == 1


def test_a_new_card_replaces_the_pods() -> None:
    """The card's checksum is an annotation of the pod; nothing else in the pod depends on the card's text."""
    values = values_of("own-card")
    old = render(values).pod
    values["card"]["content"] = values["card"]["content"].replace("default: 20", "default: 30")
    new = render(values).pod
    checksums = [pod["metadata"]["annotations"].pop("checksum/card") for pod in (old, new)]
    assert checksums[0] != checksums[1]
    assert old == new


def test_an_unready_replica_does_not_block_a_node_drain(release: Rendered) -> None:
    """The disruption budget allows the eviction of pods that are not ready."""
    for budget in release.of("PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == release.values["podDisruptionBudget"]["maxUnavailable"]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize("slots", [1, 8])
def test_the_default_memory_is_that_of_the_model(slots: int) -> None:
    """The weights of Llama-2-7B at 16 bits, the keys and values of every slot, and 1 GiB."""
    card = (CHART / "files/cards/llama-2-7b-chat-fp16.yaml").read_text(encoding="utf-8")
    card = card.replace("max_concurrent_requests: 1", f"max_concurrent_requests: {slots}")
    release = render({"weights": {"existingClaim": "c"}, "allowUnauthenticated": True, "card": {"content": card}})
    width, hidden, layers, vocabulary = 4096, 11008, 32, 32000
    parameters = layers * (4 * width**2 + 3 * width * hidden + 2 * width) + 2 * vocabulary * width + width
    key_values = slots * card_of(release).context_length_limit * 2 * layers * width
    mebibytes = -(-(2 * (parameters + key_values) + 2**30) // 2**20)
    memory = {kind: amounts["memory"] for kind, amounts in release.server["resources"].items()}
    assert memory == {"requests": f"{mebibytes}Mi", "limits": f"{mebibytes}Mi"}
