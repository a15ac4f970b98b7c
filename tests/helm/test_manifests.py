"""What the chart renders for each value set under helm/llama2/ci: valid, and right where a validator does not look."""

import json
import math
import os
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
from tests.helm.chart import (
    NAMESPACE,
    VALUE_SETS,
    Manifest,
    Rendered,
    containers_of,
    environment_of,
    render,
    rendered,
    selects,
    values_of,
)
from tools.chart import CHART

from llama2_server.app import ENGINE_STOP_TIMEOUT_SECONDS
from llama2_server.card import ModelCard, load_card, parse_card
from llama2_server.config.settings import Settings
from llama2_server.usage.ledger import CLOSE_SECONDS

# The oldest that Chart.yaml allows, the newest that there is, and one between.
KUBERNETES = ("1.30", "1.34", "1.37")
# Other projects' kinds: Kubernetes has no schema of them; what they need is checked below.
CUSTOM = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}
# The names that the server's health port answers to, besides the services' own; probes ask for no others.
READINESS, LIVENESS = "", "liveness"
INFO = 1


@pytest.fixture(params=VALUE_SETS)
def release(request: pytest.FixtureRequest) -> Rendered:
    """The manifests of each value set."""
    return rendered(str(request.param))


@pytest.mark.parametrize("value_set", VALUE_SETS)
def test_helm_lints_it(value_set: str) -> None:
    """Helm's strict lint finds nothing to warn of."""
    report = helm_python.lint(CHART, values_of(value_set), strict=True)
    assert report["errors"] == []
    assert [found for found in report["messages"] if found["severity"] > INFO] == []


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_kubernetes_takes_it(release: Rendered, kubernetes: str) -> None:
    """Every manifest is valid, strictly, in three versions of Kubernetes."""
    for manifest in release.manifests:
        if manifest["kind"] in CUSTOM:
            assert manifest["apiVersion"] == CUSTOM[manifest["kind"]]
        else:
            assert kubernetes_validate.validate(manifest, kubernetes, strict=True) == kubernetes


def test_the_oldest_kubernetes_that_is_tested_is_the_oldest_that_is_allowed() -> None:
    """Chart.yaml promises nothing that was not tried."""
    assert helm_python.Chart.load(CHART).metadata["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_every_template_was_rendered() -> None:
    """The value sets leave no manifest untried, and none is always there that could be switched off."""
    templates = {name for value_set in VALUE_SETS for name in rendered(value_set).by_template}
    made = {name for value_set in VALUE_SETS for name, found in rendered(value_set).by_template.items() if found}
    assert made == templates - {"_helpers.tpl"}
    least = [manifest["kind"] for manifest in rendered("everything-off").manifests]
    assert sorted(least) == ["ConfigMap", "Deployment", "PersistentVolumeClaim", "Service", "Service"]
    assert {manifest["kind"] for manifest in rendered("everything-on").manifests} > set(CUSTOM)


def test_names_are_unique_and_belong_to_the_release(release: Rendered) -> None:
    """No two manifests are one object, all are in the release's namespace, and all say whose they are."""
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in release.manifests]
    assert len(set(names)) == len(names)
    for manifest in release.manifests:
        assert manifest["metadata"]["namespace"] == NAMESPACE
        assert selects({"app.kubernetes.io/instance": "llama2", "app.kubernetes.io/managed-by": "Helm"}, manifest)


def test_long_release_names_are_cut() -> None:
    """The longest name that Helm allows gives names that Kubernetes allows."""
    for release in ("a" * 53, "llama2-" + "b" * 46):
        for manifest in render(values_of("everything-on"), release).manifests:
            assert len(manifest["metadata"]["name"]) <= 63
            if manifest["kind"] not in CUSTOM:
                kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)


def test_selectors_take_the_servers_pods_and_no_others(release: Rendered) -> None:
    """Services, budget, policy, spread and Deployment mean the server's pods; the test's pod is none of theirs."""
    selectors = [spec["selector"] for _, spec in release.services()]
    selectors.append(release.one("Deployment")["spec"]["selector"]["matchLabels"])
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in release.of("PodDisruptionBudget")]
    selectors += [policy["spec"]["podSelector"]["matchLabels"] for policy in release.of("NetworkPolicy")]
    spread = release.pod["spec"].get("topologySpreadConstraints", [])
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    for selector in selectors:
        assert selects(selector, release.pod)
        assert not any(selects(selector, pod) for pod in release.test_pods)
        assert "app.kubernetes.io/instance" in selector


def test_services_lead_to_ports_that_there_are(release: Rendered) -> None:
    """One Service balances, one has an address a pod; each port's target is a port of the container."""
    normal, headless = release.services()
    assert normal[1].get("clusterIP") is None
    assert headless[1]["clusterIP"] == "None"
    assert headless[0]["metadata"]["name"] == normal[0]["metadata"]["name"] + "-headless"
    ports = {port["name"] for port in release.server["ports"]}
    for _, spec in (normal, headless):
        assert {port["targetPort"] for port in spec["ports"]} <= ports
    assert [port["name"] for port in normal[1]["ports"]] == ["grpc"]
    assert [port["name"] for port in headless[1]["ports"]] == ["grpc", "metrics"]


def test_the_container_listens_where_its_ports_are(release: Rendered) -> None:
    """Each named port is the port of the setting of that name, on every address of the pod."""
    listen = {"grpc": "LLAMA2_LISTEN", "health": "LLAMA2_HEALTH_LISTEN", "metrics": "LLAMA2_METRICS_LISTEN"}
    ports = {port["name"]: port["containerPort"] for port in release.server["ports"]}
    assert {name: release.env[setting] for name, setting in listen.items()} == {
        name: f"0.0.0.0:{port}" for name, port in ports.items()
    }


def test_probes_ask_the_health_port(release: Rendered) -> None:
    """Native gRPC probes on the plaintext health port, whether or not calls need TLS; loading has its own time."""
    (health,) = (port["containerPort"] for port in release.server["ports"] if port["name"] == "health")
    asked = {"startupProbe": READINESS, "readinessProbe": READINESS, "livenessProbe": LIVENESS}
    for probe, service in asked.items():
        assert release.server[probe]["grpc"].get("service", READINESS) == service
        assert release.server[probe]["grpc"]["port"] == health
    startup = release.server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= release.values["startupSeconds"]
    deadline = release.one("Deployment")["spec"]["progressDeadlineSeconds"]
    assert deadline > release.values["startupSeconds"] + release.pod["spec"]["terminationGracePeriodSeconds"]


def card_in_force(release: Rendered) -> ModelCard:
    """The card that the server will read."""
    if release.env["LLAMA2_CARD"] == "demo":
        return load_card("demo")
    (card,) = (found for found in release.of("ConfigMap") if found["metadata"]["name"].endswith("-card"))
    return parse_card(card["data"]["card.yaml"])


def test_the_longest_generation_ends_before_the_pod_does(release: Rendered) -> None:
    """SIGTERM's grace covers the card's longest generation; Kubernetes waits for that, preStop and the ledger."""
    values, spec = release.values, release.pod["spec"]
    longest = card_in_force(release).context_length_limit * values["slowestTokenSeconds"]
    grace = float(release.env["LLAMA2_SHUTDOWN_GRACE_SECONDS"])
    assert longest <= grace < longest + 1
    before = release.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert before == values["drain"]["preStopSeconds"]
    rest = spec["terminationGracePeriodSeconds"] - before - grace
    assert rest == values["drain"]["flushSeconds"]
    assert rest >= ENGINE_STOP_TIMEOUT_SECONDS + CLOSE_SECONDS


def test_a_connection_that_ends_lets_its_calls_end(release: Rendered) -> None:
    """A call that comes last on an aged connection may wait in line and then generate as long as any."""
    settings = settings_of(release, {})
    longest = card_in_force(release).context_length_limit * release.values["slowestTokenSeconds"]
    assert settings.max_connection_age_grace_seconds > settings.queue_timeout_seconds + longest
    for pod in release.test_pods:
        (timeout,) = (argument for argument in containers_of(pod)[0]["args"] if argument.startswith("--timeout="))
        assert float(timeout.removeprefix("--timeout=")) > settings.queue_timeout_seconds + longest


def test_no_container_is_more_than_restricted_allows(release: Rendered) -> None:
    """The restricted Pod Security profile, and besides a read-only root and no token for the cluster."""
    for pod in release.pods():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} < {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
        for container in containers_of(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
    for account in release.of("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_pods_run_as_an_account_that_there_is(release: Rendered) -> None:
    """The chart's own account, or the one that the values name."""
    made = [account["metadata"]["name"] for account in release.of("ServiceAccount")] or ["default"]
    assert [pod["spec"]["serviceAccountName"] for pod in release.pods()] == made * (1 + len(release.test_pods))


def test_no_service_gets_among_the_settings(release: Rendered) -> None:
    """A Service called llama2 would bring LLAMA2_PORT=tcp://… into each pod of its namespace, were links not off."""
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in release.pods())


def settings_of(release: Rendered, secrets: dict[str, str]) -> Settings:
    """The settings that a server with the rendered environment would have."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("LLAMA2_")]:
            patch.delenv(name)
        for name, value in release.env.items():
            if name.startswith("LLAMA2_"):
                patch.setenv(name, value if isinstance(value, str) else secrets.get(name, "x://y"))
        return Settings.model_validate({})


def test_the_server_takes_its_environment(release: Rendered) -> None:
    """Each LLAMA2_ variable is a setting's name with a value that it takes, and together they are possible."""
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


def files_in(release: Rendered, pod: Manifest, container: Manifest) -> dict[str, set[str] | None]:
    """What lies under each mount of a container; None where that is not the chart's to say."""
    contents: dict[str, set[str] | None] = {}
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        volume = volumes[mount["name"]]
        if "configMap" in volume:
            (found,) = (m for m in release.of("ConfigMap") if m["metadata"]["name"] == volume["configMap"]["name"])
            contents[mount["mountPath"]] = set(found["data"])
        elif "secret" in volume:
            items = volume["secret"].get("items")
            # Secrets of type kubernetes.io/tls have these.
            contents[mount["mountPath"]] = {item["path"] for item in items} if items else {"tls.crt", "tls.key"}
        else:
            contents[mount["mountPath"]] = None
    return contents


def test_paths_are_mounted(release: Rendered) -> None:
    """Every path in the environment or the arguments lies in a volume that has it."""
    for pod in release.pods():
        for container in containers_of(pod):
            contents = files_in(release, pod, container)
            texts = [value for value in environment_of(container).values() if isinstance(value, str)]
            texts += [argument.rpartition("=")[2] for argument in container.get("args", [])]
            for path in (Path(text) for text in texts if text.startswith("/")):
                (mount,) = (mount for mount in contents if path.is_relative_to(mount))
                names = contents[mount]
                assert names is None or str(path.relative_to(mount)) in names


def test_every_volume_is_mounted_and_every_claim_is_there(release: Rendered) -> None:
    """No volume is left over; what is claimed is made by the chart or named by the values, and all made is used."""
    values = release.values
    made = {claim["metadata"]["name"] for claim in release.of("PersistentVolumeClaim")}
    claimed = set()
    for pod in release.pods():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        mounts = [mount for container in containers_of(pod) for mount in container.get("volumeMounts", [])]
        assert {mount["name"] for mount in mounts} == volumes
        for volume in pod["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                claimed.add(volume["persistentVolumeClaim"]["claimName"])
    own = {values["weights"]["existingClaim"], values["data"]["existingClaim"]} - {""}
    assert claimed == made | own


def test_what_only_the_init_container_writes_is_read_only_to_the_server(release: Rendered) -> None:
    """The server writes to its data directory and /tmp, and nowhere else."""
    written = {mount["mountPath"] for mount in release.server["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"/data", "/tmp"}  # noqa: S108 - in the pod


def secrets_in(node: Any) -> set[str]:
    """The names of all Secrets that a manifest refers to."""
    if isinstance(node, list):
        return {name for item in node for name in secrets_in(item)}
    if not isinstance(node, dict):
        return set()
    here = {node["secretName"]} if "secretName" in node else set()
    if "secretKeyRef" in node:
        here.add(node["secretKeyRef"]["name"])
    return here.union(*map(secrets_in, node.values()))


def test_secrets_are_the_ones_that_the_values_name(release: Rendered) -> None:
    """The chart makes no Secret, and no value of one stands in a manifest."""
    values = release.values
    named = {values[section]["secret"] for section in ("apiKeys", "redis", "usage", "tls")}
    named |= {values["tls"]["clientCaSecret"], values["weights"]["hubToken"]["secret"], values["test"]["clientSecret"]}
    named |= {values["test"]["apiKey"]["secret"], values["test"]["caSecret"]}
    assert secrets_in(release.manifests) <= named - {""}
    assert not release.of("Secret")
    server = {values[section]["secret"] for section in ("apiKeys", "redis", "usage", "tls")} | {
        values["tls"]["clientCaSecret"]
    }
    assert server - {""} <= secrets_in(release.pod)


def test_the_policy_opens_the_ports_that_there_are(release: Rendered) -> None:
    """Calls from clients, scrapes from monitoring, probes from anywhere; no port besides, no port that is not there."""
    if not release.values["networkPolicy"]["enabled"]:
        assert not release.of("NetworkPolicy")
        return
    policy = release.one("NetworkPolicy")["spec"]
    opened = {port["port"]: rule.get("from") for rule in policy["ingress"] for port in rule["ports"]}
    assert set(opened) == {port["name"] for port in release.server["ports"]}
    assert sum(len(rule["ports"]) for rule in policy["ingress"]) == len(opened)
    assert opened["health"] is None
    assert opened["grpc"]
    assert opened["metrics"]
    for pod in release.test_pods:
        peers = [peer["podSelector"].get("matchLabels", {}) for peer in opened["grpc"] if "podSelector" in peer]
        assert any(selects(peer, pod) for peer in peers)


@pytest.mark.parametrize(
    ("value_set", "expected"),
    [
        ("demo", [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}]),
        ("mtls", [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}]),
        ("production-gpu", None),
        ("many-replicas", None),
    ],
)
def test_a_pod_that_needs_nothing_outside_reaches_nothing(value_set: str, expected: Any) -> None:
    """With no Hub, Redis, PostgreSQL or traces only names may be looked up; else only the values can close it."""
    policy = rendered(value_set).one("NetworkPolicy")["spec"]
    assert policy.get("egress") == expected
    assert ("Egress" in policy["policyTypes"]) is (expected is not None)


def test_egress_rules_of_the_values_come_beside_dns() -> None:
    """What the values allow, and names."""
    release = rendered("everything-on")
    policy = release.one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"][1:] == release.values["networkPolicy"]["egress"]
    assert policy["egress"][0]["ports"] == [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]


def test_a_gpu_is_asked_for_and_its_taint_tolerated(release: Rendered) -> None:
    """The 7B gets one GPU, the demo and `gpu.count: 0` none."""
    gpus = 0 if release.values["demo"] or release.values["gpu"].get("count") == 0 else 1
    resource = release.values["gpu"]["resource"]
    assert release.server["resources"]["limits"].get(resource, 0) == gpus
    tolerations = release.pod["spec"].get("tolerations", [])
    assert tolerations[gpus:] == release.values["tolerations"]
    assert tolerations[:gpus] == [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}] * gpus
    for init in release.pod["spec"].get("initContainers", []):
        assert resource not in init["resources"]["limits"]


def test_pods_are_placed_as_the_values_say() -> None:
    """Node selector, affinity, priority, runtime class, pull secrets, annotations and labels reach the pod."""
    values, pod = rendered("everything-on").values, rendered("everything-on").pod
    for name in ("nodeSelector", "affinity", "priorityClassName", "runtimeClassName"):
        assert pod["spec"][name] == values[name]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["metadata"]["annotations"]["example.com/team"] == "text"
    assert pod["metadata"]["labels"]["example.com/cost-centre"] == "42"
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "server"


def test_the_image_is_the_same_everywhere(release: Rendered) -> None:
    """Server, init container and test run one image: by digest, else by tag, else by the chart's appVersion."""
    image = release.values["image"]
    version = image["tag"] or helm_python.Chart.load(CHART).metadata["appVersion"]
    expected = f"{image['repository']}@{image['digest']}" if image["digest"] else f"{image['repository']}:{version}"
    assert {container["image"] for pod in release.pods() for container in containers_of(pod)} == {expected}


def test_a_volume_for_one_pod_means_that_the_old_pod_stops_first(release: Rendered) -> None:
    """Else the new pod could wait for ever for a volume that the old one holds until the new one is ready."""
    single = {
        claim["metadata"]["name"]
        for claim in release.of("PersistentVolumeClaim")
        if claim["spec"]["accessModes"] != ["ReadWriteMany"]
    } | ({release.values["data"]["existingClaim"]} - {""})
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in release.pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    strategy = release.one("Deployment")["spec"]["strategy"]
    if single & claims:
        assert strategy == {"type": "Recreate"}
    else:
        assert strategy == {"type": "RollingUpdate", "rollingUpdate": release.values["rollingUpdate"]}


def test_the_ledgers_file_outlives_the_pod_and_the_release() -> None:
    """Without PostgreSQL one replica keeps usage on a claim, which an uninstall leaves alone."""
    claims = {claim["metadata"]["name"]: claim for claim in rendered("production-gpu").of("PersistentVolumeClaim")}
    assert claims["llama2-data"]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    for value_set in ("demo", "many-replicas", "per-replica"):
        (data,) = (volume for volume in rendered(value_set).pod["spec"]["volumes"] if volume["name"] == "data")
        assert data["emptyDir"] == {"sizeLimit": "1Gi"}


def test_replicas_are_spread_and_scaled(release: Rendered) -> None:
    """Several replicas are spread; with autoscaling the Deployment leaves their number alone."""
    values, spec = release.values, release.one("Deployment")["spec"]
    scaled = values["autoscaling"]["enabled"]
    assert spec.get("replicas") == (None if scaled else values["replicas"])
    many = max(values["autoscaling"]["maxReplicas"] if scaled else values["replicas"], 1) > 1
    spread = release.pod["spec"].get("topologySpreadConstraints", [])
    assert [constraint["topologyKey"] for constraint in spread] == (
        [constraint["topologyKey"] for constraint in values["topologySpread"]] if many else []
    )
    for scaler in release.of("ScaledObject"):
        assert scaler["spec"]["scaleTargetRef"] == {"name": release.one("Deployment")["metadata"]["name"]}
        assert scaler["spec"]["minReplicaCount"] == values["autoscaling"]["minReplicas"]
        assert scaler["spec"]["maxReplicaCount"] == values["autoscaling"]["maxReplicas"]
        (trigger,) = scaler["spec"]["triggers"]
        assert (trigger["type"], trigger["metricType"]) == ("prometheus", "Value")
        # KEDA takes texts only.
        assert trigger["metadata"]["threshold"] == str(values["autoscaling"]["queueTimeSeconds"])
        assert trigger["metadata"]["serverAddress"] == values["autoscaling"]["prometheus"]
    assert bool(release.of("ScaledObject")) is scaled


def test_a_broken_replica_never_keeps_a_node_from_being_drained(release: Rendered) -> None:
    """The budget counts replicas that serve, and lets go of the others."""
    for budget in release.of("PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == release.values["podDisruptionBudget"]["maxUnavailable"]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_each_pod_is_scraped_once(release: Rendered) -> None:
    """The monitor selects one Service only, and a port that it has."""
    for monitor in release.of("ServiceMonitor"):
        selected = [s for s, _ in release.services() if selects(monitor["spec"]["selector"]["matchLabels"], s)]
        assert [service["spec"].get("clusterIP") for service in selected] == ["None"]
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in selected[0]["spec"]["ports"]}
        assert endpoint["interval"] == release.values["serviceMonitor"]["interval"]
        assert selects(release.values["serviceMonitor"]["labels"], monitor)


def test_weights_are_fetched_into_the_directory_that_is_served(release: Rendered) -> None:
    """The init container fetches to where --weights looks, into the same volume, with the Hub's token."""
    values = release.values["weights"]
    inits = release.pod["spec"].get("initContainers", [])
    if not values["hubId"]:
        assert inits == []
        return
    (init,) = inits
    assert init["command"] == ["llama2-server", "weights", "fetch"]
    assert init["args"][:2] == [values["hubId"], f"--to={release.env['LLAMA2_WEIGHTS']}"]
    assert init["args"][2:] == ([f"--revision={values['revision']}"] if values["revision"] else [])
    token = {"secretKeyRef": {"name": values["hubToken"]["secret"], "key": values["hubToken"]["key"]}}
    assert environment_of(init)["HF_TOKEN"] == token
    assert {"name": "weights", "mountPath": "/weights"} in init["volumeMounts"]


def test_weights_of_a_claim_are_served_from_their_directory() -> None:
    """`weights.directory` is inside the claim, which is mounted read-only."""
    release = rendered("many-replicas")
    assert release.env["LLAMA2_WEIGHTS"] == "/weights/checkpoints/Llama-2-7b-chat-hf"
    assert rendered("mtls").env["LLAMA2_WEIGHTS"] == "/weights"
    (volume,) = (volume for volume in release.pod["spec"]["volumes"] if volume["name"] == "weights")
    assert volume["persistentVolumeClaim"] == {"claimName": "llama-2-7b", "readOnly": True}


def test_a_new_card_rolls_the_pods() -> None:
    """The card's checksum is an annotation of the pod; nothing else of the pod depends on its text."""
    values = values_of("own-card")
    old = render(values).pod
    values["card"]["content"] = values["card"]["content"].replace("default: 20", "default: 30")
    new = render(values).pod
    sums = [pod["metadata"]["annotations"].pop("checksum/card") for pod in (old, new)]
    assert sums[0] != sums[1]
    assert old == new


def test_the_card_arrives_as_it_is() -> None:
    """The ConfigMap has the card's text to the letter; the demo's card is in the image."""
    shipped = (CHART / "files/cards/llama-2-7b-chat-fp16.yaml").read_text(encoding="utf-8")
    assert rendered("mtls").by_template["card.yaml"][0]["data"] == {"card.yaml": shipped}
    assert card_in_force(rendered("own-card")).context_length_limit == 4096
    assert rendered("demo").by_template["card.yaml"] == []


def test_the_test_pod_calls_as_a_client_has_to(release: Rendered) -> None:
    """`helm test` generates through the Service: with a key where there are keys, with a certificate in mutual TLS."""
    values = release.values
    for pod in release.test_pods:
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        (container,) = pod["spec"]["containers"]
        options = dict(argument.partition("=")[::2] for argument in container["args"] if argument.startswith("--"))
        assert options["--address"] == f"llama2.{NAMESPACE}.svc:{values['service']['port']}"
        assert ("--ca" in options) is bool(values["tls"]["secret"])
        assert ("--certificate" in options) is ("--key" in options) is bool(values["tls"]["clientCaSecret"])
        assert ("LLAMA2_API_KEY" in environment_of(container)) is bool(values["apiKeys"]["secret"])
        assert "generate" in container["args"]
    assert len(release.test_pods) == (f"test {'llama2'}" in release.notes)


@pytest.mark.parametrize(
    ("value_set", "tested"),
    [("demo", True), ("production-gpu", True), ("mtls", True), ("everything-on", True), ("many-replicas", False)],
)
def test_there_is_a_test_where_it_could_pass(value_set: str, tested: bool) -> None:
    """Keys without a key for the test mean that there is none, and the notes say why."""
    assert bool(rendered(value_set).test_pods) is tested
    assert ("test.apiKey.secret" in rendered(value_set).notes) is not tested


def test_notes_lead_to_a_first_reply() -> None:
    """What Helm prints after an install names the addresses, the commands and the grace."""
    notes = rendered("demo").notes
    assert f"llama2-headless.{NAMESPACE}.svc:50051" in notes
    assert "port-forward service/llama2 50051:50051" in notes
    assert "llama2 generate" in notes
    assert f"up to {math.ceil(1024 * 0.1)} s" in notes
    assert "There are no keys" in notes
    assert "There are no keys" not in rendered("production-gpu").notes


def test_the_packaged_chart_is_the_same(tmp_path: Path) -> None:
    """`helm package` takes everything along that templates read, and leaves the value sets out."""
    archive = helm_python.package(CHART, destination=tmp_path)
    with helm_python.Chart.load(archive) as packaged:
        values = values_of("everything-on")
        assert json.dumps(packaged.render(values, name="llama2", namespace=NAMESPACE)) == json.dumps(
            helm_python.Chart.load(CHART).render(values, name="llama2", namespace=NAMESPACE)
        )
        assert not [file["name"] for file in packaged.files if file["name"].startswith("ci/")]
