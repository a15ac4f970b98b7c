"""Routes of the Gateway API: what they match, where they lead, and the schemas of the Gateway API."""

import jsonschema
import pytest
from tests.helm.chart import Manifest, Rendered, Values, render, rendered, values_of
from tests.helm.test_validity import CUSTOM
from tests.support.servers.cluster_assets import schema_of

from llama2.v1 import account_pb2, model_pb2, text_generation_pb2

SERVICES = [
    service
    for module in (text_generation_pb2, model_pb2, account_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
RPCS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]
HIDDEN = ["/grpc.health.v1.Health/Watch", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/stats", "/"]


def grpc_route_matches(route: Manifest, path: str) -> bool:
    """Return whether a GRPCRoute matches a method's path."""
    _, service, _ = path.split("/") if path.count("/") == 2 else ("", "", "")
    (rule,) = route["spec"]["rules"]
    assert all(match["method"]["type"] == "Exact" and set(match) == {"method"} for match in rule["matches"])
    return service in {match["method"]["service"] for match in rule["matches"]}


def http_route_matches(route: Manifest, path: str) -> bool:
    """Return whether an HTTPRoute matches a path; a prefix matches whole elements of the path."""
    (rule,) = route["spec"]["rules"]
    exact = {match["path"]["value"] for match in rule["matches"] if match["path"]["type"] == "Exact"}
    prefixes = {match["path"]["value"] for match in rule["matches"] if match["path"]["type"] == "PathPrefix"}
    return path in exact or any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def test_routes_match_the_public_rpcs_only() -> None:
    """Each RPC has both routes; health, reflection and Envoy's own paths have none; JSON has its URLs."""
    release = rendered("gateway")
    grpc_route, http_route = release.one("GRPCRoute"), release.one("HTTPRoute")
    assert len(RPCS) >= 5
    for path in RPCS:
        assert grpc_route_matches(grpc_route, path)
        assert http_route_matches(http_route, path)
    for path in HIDDEN:
        assert not grpc_route_matches(grpc_route, path)
        assert not http_route_matches(http_route, path)
    for path in ("/v1/generate", "/client/v4/accounts/42/ai/run/@cf/meta/llama-2-7b-chat-fp16"):
        assert http_route_matches(http_route, path)


@pytest.mark.parametrize("envoy", [True, False])
@pytest.mark.parametrize("secret", ["", "tls"])
def test_routes_lead_to_a_service_that_accepts_them(envoy: bool, secret: str) -> None:
    """The backend of each route is a Service of the release, whose port says HTTP/2 in plaintext unless it has TLS."""
    values: Values = values_of("gateway") | {"envoy": {"enabled": envoy, "tls": {"secret": secret}}}
    values |= {"tls": {"secret": secret}, "test": {"enabled": False}}
    if not envoy:
        values["gateway"] = values["gateway"] | {"http": {"enabled": False}}
    release = render(values)
    services = {service["metadata"]["name"]: service["spec"] for service in release.of("Service")}
    routes = release.of("GRPCRoute") + release.of("HTTPRoute")
    assert len(routes) == (2 if envoy else 1)
    for route in routes:
        ((backend,),) = (rule["backendRefs"] for rule in route["spec"]["rules"])
        assert backend["name"] == ("llama2-envoy" if envoy else "llama2")
        (port,) = (port for port in services[backend["name"]]["ports"] if port["port"] == backend["port"])
        assert port.get("appProtocol") == (None if secret else "kubernetes.io/h2c")


def test_the_policy_of_the_servers_admits_envoy_and_envoy_admits_the_gateway() -> None:
    """With a list of clients, Envoy admits them, and the servers admit Envoy, which may connect to nothing else."""
    release = rendered("gateway")
    envoy = release.component("NetworkPolicy", "envoy")["spec"]
    gateways = release.values["networkPolicy"]["clients"]
    (http, health) = envoy["ingress"]
    assert (http["ports"], http["from"]) == ([{"port": "http"}], gateways)
    assert health["ports"] == [{"port": "health"}]
    servers = release.component("NetworkPolicy")["spec"]
    labels = servers["podSelector"]["matchLabels"]
    assert envoy["egress"][1:] == [{"ports": [{"port": "grpc"}], "to": [{"podSelector": {"matchLabels": labels}}]}]
    (grpc,) = (rule for rule in servers["ingress"] if rule["ports"] == [{"port": "grpc"}])
    assert {"podSelector": {"matchLabels": envoy["podSelector"]["matchLabels"]}} in grpc["from"]


def test_custom_resources_match_their_definitions(release: Rendered) -> None:
    """Resources of other projects are strictly valid by their CustomResourceDefinitions."""
    for manifest in release.manifests:
        if manifest["kind"] in CUSTOM:
            jsonschema.Draft202012Validator(schema_of(manifest)).validate(manifest)
