"""Values with which operators adapt the manifests to their cluster."""

import base64
from typing import Any

import helm_python
import pytest
from tests.helm.chart import Rendered, Values, environment_of, render, rendered, selects, validate

GPU: Values = {"weights": {"hubId": "meta-llama/Llama-2-7b-chat-hf"}, "apiKeys": {"secret": "keys"}}
DEMO: Values = {"demo": True}
SIDECAR: dict[str, Any] = {"name": "sidecar", "image": "registry.example.com/sidecar:1"}


def valid(values: Values, release: str = "llama2") -> Rendered:
    """Render the values, and check each manifest against Kubernetes' schema."""
    result = render(values, release)
    for manifest in result.manifests:
        validate(manifest)
    return result


def rejected(values: Values) -> str:
    """Return the message with which the chart rejects the values."""
    with pytest.raises(helm_python.HelmError) as error:
        render(values)
    return str(error.value)


def test_long_names_stay_different() -> None:
    """Two releases whose names differ after the 44th character do not share a name."""
    first, second = ("llama2-" + "a" * 45 + suffix for suffix in "xy")
    names = {valid(DEMO, release).workload["metadata"]["name"] for release in (first, second)}
    assert len(names) == 2
    assert all(len(name) <= 44 for name in names)


def test_names_can_be_overridden() -> None:
    """FullnameOverride replaces the whole name, nameOverride the chart's part of it, also in the selectors."""
    full = valid({**DEMO, "fullnameOverride": "text"})
    assert [service["metadata"]["name"] for service, _ in full.services()] == ["text", "text-headless"]
    part = valid({**DEMO, "nameOverride": "text"}, "release")
    assert part.workload["metadata"]["name"] == "release-text"
    for _, spec in part.services():
        assert spec["selector"]["app.kubernetes.io/name"] == "text"
        assert selects(spec["selector"], part.pod)


def test_common_labels_and_annotations_reach_every_manifest() -> None:
    """They are on every manifest and on the pods, and cannot replace the labels of the selectors."""
    values = {
        **DEMO,
        "commonLabels": {"example.com/owner": "ml", "app.kubernetes.io/name": "ignored"},
        "commonAnnotations": {"example.com/contact": "ml@example.com"},
    }
    result = valid(values)
    for manifest in [*result.manifests, result.pod]:
        if "helm.sh/hook" in manifest["metadata"].get("annotations", {}):
            continue
        assert manifest["metadata"]["labels"]["example.com/owner"] == "ml"
        assert manifest["metadata"]["labels"]["app.kubernetes.io/name"] == "llama2"
        assert manifest["metadata"]["annotations"]["example.com/contact"] == "ml@example.com"


def test_openshift_can_assign_the_ids() -> None:
    """A null leaves a key of the security context out; the other keys stay."""
    security = valid({**DEMO, "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}})
    assert security.pod["spec"]["securityContext"] == {
        "runAsNonRoot": True,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_volumes_variables_and_containers_are_added() -> None:
    """Additional volumes, variables, containers and init containers reach the pod."""
    values = {
        **GPU,
        "extraEnvFrom": [{"configMapRef": {"name": "proxy"}}],
        "extraVolumes": [{"name": "authorities", "configMap": {"name": "authorities"}}],
        "extraVolumeMounts": [{"name": "authorities", "mountPath": "/etc/ssl/company"}],
        "extraContainers": [SIDECAR],
        "extraInitContainers": [{**SIDECAR, "name": "wait"}],
    }
    spec = valid(values).pod["spec"]
    assert [container["name"] for container in spec["containers"]] == ["server", "sidecar"]
    assert [container["name"] for container in spec["initContainers"]] == ["wait", "weights"]
    for container in (spec["containers"][0], spec["initContainers"][1]):
        assert container["envFrom"] == values["extraEnvFrom"]
        assert values["extraVolumeMounts"][0] in container["volumeMounts"]
    assert values["extraVolumes"][0] in spec["volumes"]
    assert "initContainers" not in valid(DEMO).pod["spec"]


def test_extra_manifests_are_rendered() -> None:
    """Templates in additional manifests see the release."""
    names = [manifest["metadata"]["name"] for manifest in rendered("everything-on").of("ConfigMap")]
    assert "llama2-extra" in names


def test_a_variable_is_defined_once() -> None:
    """ExtraEnv replaces the variables of the download; a name that occurs twice is rejected."""
    (init,) = valid({**GPU, "extraEnv": [{"name": "HF_HOME", "value": "/cache"}]}).pod["spec"]["initContainers"]
    assert environment_of(init)["HF_HOME"] == "/cache"
    twice = [{"name": "HTTPS_PROXY", "value": "http://a"}, {"name": "HTTPS_PROXY", "value": "http://b"}]
    assert "extraEnv: HTTPS_PROXY is defined twice" in rejected({**DEMO, "extraEnv": twice})


@pytest.mark.parametrize("kind", ["requests", "limits"])
def test_only_gpu_count_requests_gpus(kind: str) -> None:
    """A GPU under resources is rejected: it would also be requested for the download."""
    message = rejected({**GPU, "resources": {kind: {"nvidia.com/gpu": 2}}})
    assert f"resources.{kind}: nvidia.com/gpu is set by gpu.count" in message


@pytest.mark.parametrize(
    ("resource", "taint"),
    [
        ("nvidia.com/gpu", "nvidia.com/gpu"),
        ("nvidia.com/mig-3g.40gb", "nvidia.com/gpu"),
        ("amd.com/gpu", "amd.com/gpu"),
    ],
)
def test_the_taint_of_the_gpu_is_tolerated(resource: str, taint: str) -> None:
    """Nodes with MIG resources have the taint of the whole GPU."""
    result = valid({**GPU, "gpu": {"resource": resource}})
    assert result.pod["spec"]["tolerations"] == [{"key": taint, "operator": "Exists", "effect": "NoSchedule"}]
    assert result.server["resources"]["limits"][resource] == 1


def test_a_dash_disables_dynamic_provisioning() -> None:
    """The storage class "-" is an empty class in the claim."""
    claims = valid({**GPU, "weights": {**GPU["weights"], "storageClass": "-"}}).of("PersistentVolumeClaim")
    assert [claim["spec"].get("storageClassName") for claim in claims] == [""]
    (data,) = valid({**GPU, "data": {"storageClass": "-"}}).workload["spec"]["volumeClaimTemplates"]
    assert data["spec"]["storageClassName"] == ""


def test_updates_surge_only_without_a_gpu() -> None:
    """A surge would wait for a GPU that the old pod holds; the values can ask for one."""
    shared = {"redis": {"secret": "r"}, "usage": {"secret": "u"}}
    claim = {"weights": {"existingClaim": "weights"}, "apiKeys": {"secret": "keys"}, **shared, "workload": "Deployment"}

    def rolling_update(values: Values) -> Any:
        return valid(values).workload["spec"]["strategy"]["rollingUpdate"]

    assert rolling_update(claim) == {"maxSurge": 0, "maxUnavailable": 1}
    assert rolling_update({**claim, "gpu": {"count": 0}}) == {"maxSurge": 1, "maxUnavailable": 0}
    spare = {**claim, "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert rolling_update(spare) == {"maxSurge": 1, "maxUnavailable": 0}
    assert "both 0" in rejected({**claim, "rollingUpdate": {"maxUnavailable": 0}})


def test_the_strategy_and_the_probes_can_be_replaced() -> None:
    """A strategy replaces the chart's; fields of a probe are merged into the chart's."""
    result = valid({**DEMO, "strategy": {"type": "Recreate"}, "livenessProbe": {"failureThreshold": 9}})
    assert result.workload["spec"]["strategy"] == {"type": "Recreate"}
    probe = result.server["livenessProbe"]
    assert (probe["failureThreshold"], probe["grpc"]["service"]) == (9, "liveness")


def peers(values: Values) -> Any:
    """Return the peers that may connect to the gRPC port; None if everyone may."""
    (rule,) = (
        rule
        for rule in valid(values).component("NetworkPolicy")["spec"]["ingress"]
        if rule["ports"] == [{"port": "grpc"}]
    )
    return rule.get("from")


@pytest.mark.parametrize("kind", ["LoadBalancer", "NodePort"])
def test_an_external_service_is_reachable(kind: str) -> None:
    """Without clients in the values, the network policy lets external clients in."""
    assert peers({**DEMO, "service": {"type": kind}}) is None
    assert peers(DEMO) == [{"podSelector": {}}]


def test_source_ranges_and_clients_limit_an_external_service() -> None:
    """The source ranges of a LoadBalancer, or the clients of the values, are the only peers."""
    service = {"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.0/8"]}
    assert peers({**DEMO, "service": service}) == [{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]
    clients = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "web"}}}]
    limited = peers({**DEMO, "service": service, "networkPolicy": {"clients": clients}})
    assert limited[0] == clients[0]
    assert not any("ipBlock" in peer for peer in limited)


def test_the_service_has_its_fields() -> None:
    """The fields of a LoadBalancer reach the Service; the protocol is named for proxies unless TLS is on."""
    values = {
        "type": "LoadBalancer",
        "nodePort": 30051,
        "loadBalancerClass": "example.com/lb",
        "loadBalancerSourceRanges": ["fd00::/8"],
        "ipFamilyPolicy": "PreferDualStack",
    }
    (_, spec), (_, headless) = valid({**DEMO, "service": values}).services()
    assert spec["ports"][0]["nodePort"] == 30051
    assert {key: spec[key] for key in values if key != "nodePort"} == {
        key: value for key, value in values.items() if key != "nodePort"
    }
    assert headless["ipFamilyPolicy"] == "PreferDualStack"
    assert spec["ports"][0]["appProtocol"] == "kubernetes.io/h2c"
    (_, encrypted), _ = valid({**DEMO, "tls": {"secret": "tls"}}).services()
    assert "appProtocol" not in encrypted["ports"][0]


def test_a_budget_can_name_the_available_pods() -> None:
    """MinAvailable replaces maxUnavailable; both together are rejected."""
    budget = valid({**DEMO, "podDisruptionBudget": {"minAvailable": 1, "maxUnavailable": None}})
    spec = budget.one("PodDisruptionBudget")["spec"]
    assert (spec["minAvailable"], "maxUnavailable" in spec) == (1, False)
    assert "exclude each other" in rejected({**DEMO, "podDisruptionBudget": {"minAvailable": 1}})


def test_the_test_pod_never_hangs() -> None:
    """A missing ca.crt fails the test instead of blocking its pod; a deadline bounds the rest."""
    (pod,) = valid({**DEMO, "tls": {"secret": "tls"}}).test_pods
    assert pod["spec"]["activeDeadlineSeconds"] > 0
    (volume,) = pod["spec"]["volumes"]
    assert volume["secret"]["optional"] is True


def test_a_claim_of_a_deployment_is_not_forgotten() -> None:
    """An upgrade to a StatefulSet stops with the commands that keep or move the ledger of the old claim."""
    message = '{{ include "llama2.oldClaim" . | b64enc }}'
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"message": message}}
    text = base64.b64decode(
        render({**GPU, "extraManifests": [manifest]}).by_template["extra.yaml"][0]["data"]["message"]
    )
    assert "--set data.existingClaim=llama2-data" in text.decode()
    assert "usage.forwardClaims={llama2-data}" in text.decode()
    adopted = valid({**GPU, "data": {"existingClaim": "llama2-data"}})
    (data,) = (volume for volume in adopted.pod["spec"]["volumes"] if volume["name"] == "data")
    assert data["persistentVolumeClaim"] == {"claimName": "llama2-data"}
    assert "volumeClaimTemplates" not in adopted.workload["spec"]
