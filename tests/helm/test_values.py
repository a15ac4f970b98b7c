"""values.yaml documents every value, its schema refuses every other one, and bad values are refused in plain words."""

import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml
from tests.helm.chart import NAMESPACE, VALUE_SETS, Values, chart, values_of
from tools.chart import CHART, SCHEMA, cards, values_schema

from llama2_server.config.settings import Settings

ELSEWHERE: Values = {"weights": {"existingClaim": "c"}, "allowUnauthenticated": True}
STORES: Values = {"redis": {"secret": "r"}, "usage": {"secret": "l"}}


def refusal(values: Values) -> str:
    """What Helm says to these values, on one line."""
    with pytest.raises(helm_python.HelmError) as refused:
        chart().render(values, name="llama2", namespace=NAMESPACE)
    return " ".join(str(refused.value).split())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # What the schema says: where, and what is allowed.
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
        ({"demo": True, "apiKeys": {"secret": "Not_A_Name"}}, "at '/apiKeys/secret': 'Not_A_Name' does not match pattern"),
        ({"weights": {"hubId": "./here"}}, "at '/weights/hubId': './here' does not match pattern"),
        ({"weights": {"directory": "../up"}}, "at '/weights/directory': '../up' does not match pattern"),
        ({"demo": True, "extraEnv": [{"name": "LLAMA2_LISTEN", "value": "x"}]}, "at '/extraEnv/0/name': 'not' failed"),
        ({"demo": True, "alerts": {"errorRatio": 5}}, "at '/alerts/errorRatio': maximum: got 5, want 1"),
        # What only the templates can say: what is wrong, and what to do.
        ({}, "weights: there are none; set weights.hubId to fetch them, or weights.existingClaim"),
        ({"weights": {"existingClaim": "c"}}, "apiKeys.secret: without keys anybody who reaches the port may call; name"),
        (ELSEWHERE | {"apiKeys": {"secret": "k"}}, "allowUnauthenticated: there are keys too; leave one of apiKeys.secret and"),
        ({"demo": True, "weights": {"hubId": "a/b"}}, "demo: the demo model brings its own card and weights; leave"),
        ({"demo": True, "card": {"content": "x"}}, "demo: the demo model brings its own card and weights; leave"),
        (ELSEWHERE | {"card": {"name": "13b"}}, 'card.name: no card "13b" ships with the chart, only demo, llama-2-7b'),
        (ELSEWHERE | {"card": {"content": "a: ]"}}, "card: not YAML: "),
        (ELSEWHERE | {"card": {"content": "a: b"}}, "card: model.properties has no positive context_length_limit"),
        (ELSEWHERE | {"card": {"content": "model: x"}}, "card: model.properties has no positive context_length_limit"),
        (
            {"allowUnauthenticated": True, "weights": {"hubId": "a/b", "directory": "d"}},
            "weights.directory: with weights.hubId the chart names the directory itself; leave it empty",
        ),
        (ELSEWHERE | {"tls": {"clientCaSecret": "ca"}}, "tls.clientCaSecret: mutual TLS needs the server's own cert"),
        (
            {"allowUnauthenticated": True, "weights": {"hubId": "a/b"}, "replicas": 2} | STORES,
            "weights.accessMode: 2 replicas cannot share a ReadWriteOnce volume; set ReadWriteMany and",
        ),
        (
            ELSEWHERE | STORES | {"replicas": 2, "data": {"existingClaim": "d"}},
            "data.existingClaim: one volume cannot be the data volume of several replicas; leave it empty",
        ),
        (
            ELSEWHERE | STORES | {"autoscaling": {"enabled": True, "minReplicas": 5}},
            "autoscaling.maxReplicas: 4 is less than minReplicas, 5",
        ),
        (
            ELSEWHERE | STORES | {"autoscaling": {"enabled": True}},
            "serviceMonitor.enabled: autoscaling and alerts ask Prometheus for what it scraped; set it to true",
        ),
        ({"demo": True, "alerts": {"enabled": True}}, "serviceMonitor.enabled: autoscaling and alerts ask Prometheus"),
        (
            {"demo": True, "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}},
            "rollingUpdate: with maxSurge and maxUnavailable both 0 no pod could ever be replaced; raise one",
        ),
    ],
)
def test_bad_values_are_refused_in_plain_words(values: Values, message: str) -> None:
    """The message names the key, says what is allowed, and where that is not enough what to do."""
    assert message in refusal(values)


MANY: list[Values] = [
    {"replicas": 2},
    {"autoscaling": {"enabled": True}, "serviceMonitor": {"enabled": True}},
]


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("missing", ["redis", "usage"])
def test_replicas_with_quotas_need_redis_and_postgresql(many: Values, missing: str) -> None:
    """The schema refuses several replicas that would count for themselves, and lists every way out."""
    stores = {name: store for name, store in STORES.items() if name != missing}
    said = refusal(ELSEWHERE | many | stores)
    assert f"at '/{missing}/secret': minLength: got 0, want 1" in said
    assert "at '/quotas': value must be 'perReplica'" in said
    assert ("'/replicas': maximum: got 2, want 1" in said) is ("replicas" in many)
    assert ("'/autoscaling/enabled': value must be false" in said) is ("autoscaling" in many)


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("way_out", [STORES, {"quotas": "perReplica"}])
def test_with_either_way_out_replicas_are_rendered(many: Values, way_out: Values) -> None:
    """Both stores, or quotas and usage of each replica's own."""
    assert chart().render(ELSEWHERE | many | way_out, name="llama2", namespace=NAMESPACE)


@pytest.mark.parametrize("value_set", VALUE_SETS)
def test_value_sets_pass_the_schema(value_set: str) -> None:
    """Each set under `ci` is one that a user could install."""
    chart().validate_schema(values_of(value_set))


def keys_of(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys in a values file; maps that the chart leaves to Kubernetes have none of their own."""
    for key, value in node.items():
        yield f"{path}/{key}"
        if isinstance(value, dict) and f"{path}/{key}" not in {"/settings", "/dashboard/labels"}:
            yield from keys_of(value, f"{path}/{key}")


def schema_keys(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys that the schema knows."""
    for key, value in node.get("properties", {}).items():
        if f"{path}/{key}" in {"/global", "/resources/requests", "/resources/limits", "/resources/claims"}:
            continue  # Helm's own, and a container's own
        yield f"{path}/{key}"
        if f"{path}/{key}" != "/settings":
            yield from schema_keys(value, f"{path}/{key}")


def test_values_and_schema_have_the_same_keys() -> None:
    """No value without a default and a place in the documentation, none without a type."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert sorted(keys_of(values)) == sorted(schema_keys(json.loads(SCHEMA.read_text(encoding="utf-8"))))


def test_no_object_of_the_schema_takes_unknown_keys() -> None:
    """Wherever the schema lists keys, it refuses others."""

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
    """Each key has a comment, or its parent has one, or it is a section all of whose keys have one."""
    undescribed: list[str] = []
    commented_depths: list[int] = []  # of the described keys that the current line may be inside of
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


def test_the_defaults_of_the_settings_are_the_servers() -> None:
    """What values.yaml says about a setting is what the server would do without it."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    for name, value in values["settings"].items():
        assert value == Settings.model_fields[name].default


def test_cards_and_settings_are_the_servers() -> None:
    """The chart's copies are up to date; `python -m tools.chart` makes them so."""
    assert SCHEMA.read_text(encoding="utf-8") == values_schema()
    copies = {path: path.read_text(encoding="utf-8") for path in (CHART / "files/cards").iterdir()}
    assert copies == cards()


def test_the_readmes_values_can_be_installed() -> None:
    """Each block of values in the chart's README is taken, the later ones on top of the first."""
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    first, *more = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)]
    assert more
    for block in ({}, *more):
        values = first | block | {"weights": first["weights"] | block.get("weights", {})}
        assert chart().render(values, name="llama2", namespace=NAMESPACE)
    assert "--set demo=true" in readme
