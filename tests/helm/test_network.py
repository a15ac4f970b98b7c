"""Services, ports, probes, network policy and scraping."""

from typing import Any

import pytest
from tests.helm.chart import Rendered, rendered, selects

# The service names of the server's health port that probes use.
READINESS, LIVENESS = "", "liveness"


def test_selectors_match_the_server_pods_only(release: Rendered) -> None:
    """Services, budget, policy, spread and workload select the server's pods, not the test's pod."""
    selectors = [spec["selector"] for _, spec in release.services()]
    selectors.append(release.workload["spec"]["selector"]["matchLabels"])
    if release.values["podDisruptionBudget"]["enabled"]:
        selectors.append(release.component("PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    if release.values["networkPolicy"]["enabled"]:
        selectors.append(release.component("NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    spread = release.pod["spec"].get("topologySpreadConstraints", [])
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    for selector in selectors:
        assert selects(selector, release.pod)
        assert not any(selects(selector, pod) for pod in release.test_pods + release.envoys)
        assert "app.kubernetes.io/instance" in selector


def test_service_ports_exist_in_the_container(release: Rendered) -> None:
    """One Service balances, one has an address per pod; each target port is a port of the container."""
    normal, headless = release.services()
    assert normal[1].get("clusterIP") is None
    assert headless[1]["clusterIP"] == "None"
    assert headless[0]["metadata"]["name"] == normal[0]["metadata"]["name"] + "-headless"
    ports = {port["name"] for port in release.server["ports"]}
    for _, spec in (normal, headless):
        assert {port["targetPort"] for port in spec["ports"]} <= ports
    assert [port["name"] for port in normal[1]["ports"]] == ["grpc"]
    assert [port["name"] for port in headless[1]["ports"]] == ["grpc", "metrics"]


def test_container_ports_match_the_listen_settings(release: Rendered) -> None:
    """Each named port is the port of its setting, on every address of the pod."""
    listen = {"grpc": "LLAMA2_LISTEN", "health": "LLAMA2_HEALTH_LISTEN", "metrics": "LLAMA2_METRICS_LISTEN"}
    ports = {port["name"]: port["containerPort"] for port in release.server["ports"]}
    assert {name: release.env[setting] for name, setting in listen.items()} == {
        name: f"0.0.0.0:{port}" for name, port in ports.items()
    }


def test_probes_use_the_health_port(release: Rendered) -> None:
    """Probes use gRPC on the plaintext health port, with and without TLS; startup has a separate timeout."""
    (health,) = (port["containerPort"] for port in release.server["ports"] if port["name"] == "health")
    expected = {"startupProbe": READINESS, "readinessProbe": READINESS, "livenessProbe": LIVENESS}
    for probe, service in expected.items():
        assert release.server[probe]["grpc"].get("service", READINESS) == service
        assert release.server[probe]["grpc"]["port"] == health
    startup = release.server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= release.values["startupSeconds"]
    if release.workload["kind"] == "Deployment":
        deadline = release.workload["spec"]["progressDeadlineSeconds"]
        assert deadline > release.values["startupSeconds"] + release.pod["spec"]["terminationGracePeriodSeconds"]


def test_the_network_policy_opens_the_container_ports(release: Rendered) -> None:
    """Ingress is open for clients, monitoring and probes, on the container's ports only."""
    if not release.values["networkPolicy"]["enabled"]:
        assert not release.of("NetworkPolicy")
        return
    policy = release.component("NetworkPolicy")["spec"]
    opened = {port["port"]: rule.get("from") for rule in policy["ingress"] for port in rule["ports"]}
    assert set(opened) == {port["name"] for port in release.server["ports"]}
    assert sum(len(rule["ports"]) for rule in policy["ingress"]) == len(opened)
    assert opened["health"] is None
    assert opened["grpc"]
    assert opened["metrics"]
    for pod in release.test_pods + release.envoys:
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
def test_egress_is_closed_without_external_services(value_set: str, expected: Any) -> None:
    """Without Hub, Redis, PostgreSQL and traces only DNS is open; otherwise only the values can close egress."""
    policy = rendered(value_set).component("NetworkPolicy")["spec"]
    assert policy.get("egress") == expected
    assert ("Egress" in policy["policyTypes"]) is (expected is not None)


def test_egress_rules_are_added_to_dns() -> None:
    """The rules of the values follow the DNS rule."""
    release = rendered("everything-on")
    policy = release.component("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"][1:] == release.values["networkPolicy"]["egress"]
    assert policy["egress"][0]["ports"] == [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]


def test_each_pod_is_scraped_once(release: Rendered) -> None:
    """The monitor selects one Service only, and one of its ports."""
    for monitor in release.of("ServiceMonitor"):
        selected = [s for s, _ in release.services() if selects(monitor["spec"]["selector"]["matchLabels"], s)]
        assert [service["spec"].get("clusterIP") for service in selected] == ["None"]
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in selected[0]["spec"]["ports"]}
        assert endpoint["interval"] == release.values["serviceMonitor"]["interval"]
        assert selects(release.values["serviceMonitor"]["labels"], monitor)


def test_a_pod_monitor_scrapes_the_server_only() -> None:
    """The monitor selects the server's pods, and its targets get the label by which the queries select the release."""
    release = rendered("image-volume")
    monitor = release.one("PodMonitor")
    assert selects(monitor["spec"]["selector"]["matchLabels"], release.pod)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (server,) = release.pod["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in server["ports"]}
    assert endpoint["interval"] == "15s"
    label, own = endpoint["relabelings"]
    assert label["targetLabel"] == "service"
    assert f'service="{label["replacement"]}"' in str(release.one("PrometheusRule"))
    assert own == release.values["podMonitor"]["relabelings"][0]


def test_nothing_may_connect_to_the_test_and_the_jobs(release: Rendered) -> None:
    """A policy without rules selects every pod of the release; the other policies open the ports of the servers."""
    if not release.values["networkPolicy"]["enabled"]:
        return
    (policy,) = (policy["spec"] for policy in release.of("NetworkPolicy") if "ingress" not in policy["spec"])
    assert policy["policyTypes"] == ["Ingress"]
    assert all(selects(policy["podSelector"]["matchLabels"], pod) for pod in release.pods())
