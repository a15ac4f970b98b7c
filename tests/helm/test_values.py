"""values.yaml documents every value, the schema rejects unknown keys, and error messages tell how to fix values."""

import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml
from tests.helm.chart import NAMESPACE, VALUE_SETS, Values, chart, values_of
from tools.chart import CHART, SCHEMA, copies, values_schema

from llama2_server.config.settings import Settings

MINIMAL: Values = {"weights": {"existingClaim": "c"}, "allowUnauthenticated": True}
CARD_WITHOUT_SLOTS = "model: {properties: [{property_id: context_length_limit, value: '10'}]}"
STORES: Values = {"redis": {"secret": "r"}, "usage": {"secret": "l"}}


def both_routes(grpc: list[str], http: list[str]) -> Values:
    """Return values with both routes on one listener, with these host names."""
    routes = {
        kind: {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": names}
        for kind, names in (("grpc", grpc), ("http", http))
    }
    return {"demo": True, "envoy": {"enabled": True}, "gateway": routes}


def rejection(values: Values) -> str:
    """Return Helm's error message for these values, on one line."""
    with pytest.raises(helm_python.HelmError) as error:
        chart().render(values, name="llama2", namespace=NAMESPACE)
    return " ".join(str(error.value).split())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # Schema errors: the location and the allowed values.
        ({"demo": True, "replica": 2}, "at '': additional properties 'replica' not allowed"),
        ({"demo": True, "image": {"name": "x"}}, "at '/image': additional properties 'name' not allowed"),
        (
            {"demo": True, "settings": {"max_queue_sizes": 3}},
            "at '/settings': additional properties 'max_queue_sizes' not",
        ),
        (
            {"demo": True, "settings": {"shutdown_grace_seconds": 3}},
            "at '/settings': additional properties 'shutdown_grace_seconds' not",
        ),
        (
            {"demo": True, "settings": {"max_queue_size": "many"}},
            "at '/settings/max_queue_size': got string, want integer",
        ),
        ({"demo": True, "settings": {"log_level": "loud"}}, "must be one of 'debug', 'info', 'warning', 'error'"),
        ({"demo": "yes"}, "at '/demo': got string, want boolean"),
        ({"demo": True, "gpu": {"count": 2}}, "at '/gpu/count': value must be one of"),
        ({"demo": True, "image": {"pullPolicy": "Never ever"}}, "must be one of 'Always', 'IfNotPresent', 'Never'"),
        ({"demo": True, "image": {"digest": "0f9a"}}, "at '/image/digest': '0f9a' does not match pattern '^(sha256:"),
        ({"demo": True, "slowestTokenSeconds": 0}, "at '/slowestTokenSeconds': exclusiveMinimum: got 0, want 0"),
        ({"demo": True, "drain": {"flushSeconds": 5}}, "at '/drain/flushSeconds': minimum: got 5, want 20"),
        ({"demo": True, "data": {"size": "big"}}, "at '/data/size': 'big' does not match pattern"),
        (
            {"demo": True, "apiKeys": {"secret": "Not_A_Name"}},
            "at '/apiKeys/secret': 'Not_A_Name' does not match pattern",
        ),
        ({"weights": {"hubId": "./here"}}, "at '/weights/hubId': './here' does not match pattern"),
        ({"weights": {"directory": "../up"}}, "at '/weights/directory': '../up' does not match pattern"),
        ({"demo": True, "extraEnv": [{"name": "LLAMA2_LISTEN", "value": "x"}]}, "at '/extraEnv/0/name': 'not' failed"),
        ({"demo": True, "alerts": {"errorRatio": 5}}, "at '/alerts/errorRatio': maximum: got 5, want 1"),
        # Template errors: the problem and its fix.
        ({}, "weights: not set; set weights.hubId to download them, weights.existingClaim to"),
        (
            {"weights": {"existingClaim": "c"}},
            "apiKeys.secret: not set, so every client that can reach the port may call; set",
        ),
        (
            MINIMAL | {"apiKeys": {"secret": "k"}},
            "allowUnauthenticated: apiKeys.secret is also set; set only one of them",
        ),
        ({"demo": True, "weights": {"hubId": "a/b"}}, "demo: the demo model has its own card and weights; leave"),
        ({"demo": True, "card": {"content": "x"}}, "demo: the demo model has its own card and weights; leave"),
        (
            MINIMAL | {"card": {"name": "13b"}},
            'card.name: "13b" does not ship with the chart (available: demo, llama-2-7b',
        ),
        (MINIMAL | {"card": {"content": "a: ]"}}, "card: not valid YAML: "),
        (MINIMAL | {"card": {"content": "a: b"}}, "card: model.properties has no positive context_length_limit"),
        (MINIMAL | {"card": {"content": "model: x"}}, "card: model.properties has no positive context_length_limit"),
        (
            MINIMAL | {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}},
            "podMonitor.enabled: serviceMonitor.enabled is also true, so Prometheus would scrape every pod",
        ),
        (
            {"allowUnauthenticated": True, "weights": {"hubId": "a/b", "image": {"reference": "r"}}},
            "weights.image.reference: weights.hubId or weights.existingClaim is also set; set only one place",
        ),
        (
            MINIMAL | {"card": {"content": CARD_WITHOUT_SLOTS}},
            "card: constellation_config has no positive max_concurrent_requests; check that the file is a model card",
        ),
        (
            {"allowUnauthenticated": True, "weights": {"hubId": "a/b", "directory": "d"}},
            "weights.directory: the chart derives the directory from weights.hubId; leave it empty",
        ),
        (MINIMAL | {"tls": {"clientCaSecret": "ca"}}, "tls.clientCaSecret: mutual TLS also needs the server's cert"),
        (
            {"allowUnauthenticated": True, "weights": {"hubId": "a/b"}, "replicas": 2} | STORES,
            "weights.accessMode: 2 replicas cannot share a ReadWriteOnce volume; set ReadWriteMany and",
        ),
        (
            MINIMAL | STORES | {"replicas": 2, "data": {"existingClaim": "d"}},
            "data.existingClaim: several replicas cannot share one data volume; leave it empty",
        ),
        (
            MINIMAL | STORES | {"autoscaling": {"enabled": True, "minReplicas": 5}},
            "autoscaling.maxReplicas: 4 is less than minReplicas (5); raise it",
        ),
        (
            MINIMAL | STORES | {"autoscaling": {"enabled": True}},
            "serviceMonitor.enabled: autoscaling and alerts need scraped metrics; set it or podMonitor",
        ),
        ({"demo": True, "alerts": {"enabled": True}}, "serviceMonitor.enabled: autoscaling and alerts need scraped"),
        (
            {"allowUnauthenticated": True, "weights": {"hubId": "a/b", "download": "job"}},
            "weights.download: the Job and the pods may run on different nodes, which cannot share a ReadWriteOnce",
        ),
        (
            {"demo": True, "gateway": {"http": {"enabled": True, "parentRefs": [{"name": "g"}]}}},
            "gateway.http.enabled: Envoy converts JSON and gRPC-Web to gRPC; set envoy.enabled to true",
        ),
        ({"demo": True, "gateway": {"grpc": {"enabled": True}}}, "gateway.grpc.parentRefs: not set; name the Gateway"),
        (both_routes([], ["b.example.com"]), "gateway: one listener accepts either the GRPCRoute or the HTTPRoute"),
        (
            both_routes(["a.example.com", "*.b.example.com"], ["a.b.example.com"]),
            "gateway.grpc.hostnames: *.b.example.com overlaps with a.b.example.com of gateway.http.hostnames",
        ),
        (
            MINIMAL | {"tls": {"secret": "t", "clientCaSecret": "ca"}, "envoy": {"enabled": True}},
            "envoy.clientSecret: the servers require client certificates (tls.clientCaSecret); set the Secret",
        ),
        (
            {"demo": True, "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}},
            "rollingUpdate: no pod can be replaced if maxSurge and maxUnavailable are both 0; raise one",
        ),
    ],
)
def test_invalid_values_are_rejected_with_a_fix(values: Values, message: str) -> None:
    """The message names the key, the allowed values and, if needed, the fix."""
    assert message in rejection(values)


SEVERAL_REPLICAS: list[Values] = [
    {"replicas": 2},
    {"autoscaling": {"enabled": True}, "serviceMonitor": {"enabled": True}},
]


@pytest.mark.parametrize("replicas", SEVERAL_REPLICAS)
@pytest.mark.parametrize("missing", ["redis", "usage"])
def test_replicas_with_quotas_need_redis_and_postgresql(replicas: Values, missing: str) -> None:
    """The schema rejects several replicas with separate quotas, and lists every solution."""
    stores = {name: store for name, store in STORES.items() if name != missing}
    message = rejection(MINIMAL | replicas | stores)
    assert f"at '/{missing}/secret': minLength: got 0, want 1" in message
    assert "at '/quotas': value must be 'perReplica'" in message
    assert ("'/replicas': maximum: got 2, want 1" in message) is ("replicas" in replicas)
    assert ("'/autoscaling/enabled': value must be false" in message) is ("autoscaling" in replicas)


@pytest.mark.parametrize("replicas", SEVERAL_REPLICAS)
@pytest.mark.parametrize("solution", [STORES, {"quotas": "perReplica"}])
def test_either_solution_renders_several_replicas(replicas: Values, solution: Values) -> None:
    """Both stores, or separate quotas and usage for each replica."""
    assert chart().render(MINIMAL | replicas | solution, name="llama2", namespace=NAMESPACE)


@pytest.mark.parametrize("value_set", VALUE_SETS)
def test_value_sets_pass_the_schema(value_set: str) -> None:
    """Users can install each set under `ci`."""
    chart().validate_schema(values_of(value_set))


def keys_of(node: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all keys in a values file, except the keys of maps that the chart passes to Kubernetes."""
    for key, value in node.items():
        yield f"{path}/{key}"
        if isinstance(value, dict) and f"{path}/{key}" not in {"/settings", "/dashboard/labels"}:
            yield from keys_of(value, f"{path}/{key}")


# Objects whose keys Helm or Kubernetes defines.
KUBERNETES_OBJECTS = {"/global", "/resources/requests", "/resources/limits", "/resources/claims"}
SECURITY_CONTEXTS = ("podSecurityContext", "containerSecurityContext")


def schema_keys(node: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all keys in the schema."""
    for key, value in node.get("properties", {}).items():
        if f"{path}/{key}" in KUBERNETES_OBJECTS:
            continue
        yield f"{path}/{key}"
        if f"{path}/{key}" != "/settings":
            yield from schema_keys(value, f"{path}/{key}")


def test_values_and_schema_have_the_same_keys() -> None:
    """Each value has a default, a comment and a type."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    values |= dict.fromkeys(SECURITY_CONTEXTS)
    assert sorted(keys_of(values)) == sorted(schema_keys(json.loads(SCHEMA.read_text(encoding="utf-8"))))


def test_the_schema_rejects_unknown_keys() -> None:
    """Every object of the schema that lists its keys rejects others."""

    def objects(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if "properties" in node and "type" in node:
                yield node
            for name, value in node.items():
                if name != "anyOf":
                    yield from objects(value)

    found = list(objects(json.loads(SCHEMA.read_text(encoding="utf-8"))))
    assert len(found) > 20
    assert all(node["additionalProperties"] is False for node in found)


def test_every_value_is_described() -> None:
    """Each key, its parent or all of its children have a comment."""
    undescribed: list[str] = []
    commented_depths: list[int] = []  # of described keys that may contain the current line
    above = ""
    for line in (CHART / "values.yaml").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)([A-Za-z_]+):(.*)", line):
            depth = len(match[1])
            commented_depths = [outer for outer in commented_depths if outer < depth]
            if above.strip().startswith("#") or " # " in match[3]:
                commented_depths.append(depth)
            elif match[3] and not commented_depths:
                undescribed.append(line)
        above = line
    assert undescribed == []


def test_the_default_settings_equal_the_server_defaults() -> None:
    """A setting in values.yaml has the default of the server."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    for name, value in values["settings"].items():
        assert value == Settings.model_fields[name].default


def test_cards_and_settings_match_the_server() -> None:
    """The chart's copies are current; `python -m tools.chart` updates them."""
    assert SCHEMA.read_text(encoding="utf-8") == values_schema()
    found = {path: path.read_bytes() for folder in ("cards", "envoy") for path in (CHART / "files" / folder).iterdir()}
    assert found == copies()


def test_the_values_of_the_readme_are_valid() -> None:
    """Each block of values in the chart's README renders; later blocks extend the first one."""
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    first, *more = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)]
    assert more
    for block in ({}, *more):
        values = first | block | {"weights": first["weights"] | block.get("weights", {})}
        assert chart().render(values, name="llama2", namespace=NAMESPACE)
    assert "--set demo=true" in readme
