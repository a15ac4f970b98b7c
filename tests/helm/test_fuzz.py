"""No values render manifests that an API server rejects: random values that fit the schema, without free-form keys."""

import json
import os
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import helm_python
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from tests.helm.chart import Manifest, Rendered, Values, containers_of, environment_of, render, validate
from tests.helm.test_validity import CUSTOM, KUBERNETES
from tools.chart import SCHEMA

Strategy = st.SearchStrategy[Any]
VALUES_SCHEMA = json.loads(SCHEMA.read_text(encoding="utf-8"))
# The settings have tests of their own, and a card's content is free text.
LEFT_OUT = {"global", "settings", "card"}
UNITS = {"m": Decimal("0.001"), "": Decimal(1), "M": Decimal(10) ** 6, "G": Decimal(10) ** 9, "T": Decimal(10) ** 12}
UNITS |= {"Mi": Decimal(2) ** 20, "Gi": Decimal(2) ** 30, "Ti": Decimal(2) ** 40}
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
MAX_CHARACTERS = {"Service": 63, "StatefulSet": 52, "Job": 63}  # a StatefulSet's pods have its name in a label
MAX_CHANGED_VALUES = 5
EXAMPLES = int(os.environ.get("CHART_FUZZ_EXAMPLES", "100"))  # about five in a second
# Texts that YAML reads as something else if a template does not quote them.
YAML_WORDS = ["true", "null", "on", "1e3", "123", "0x1f", "1.5", "y"]


def values_for(schema: dict[str, Any]) -> Strategy | None:
    """Return a strategy for a part of the schema, or None for a free-form part."""
    if "$ref" in schema:
        return values_for(VALUES_SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        common = {key: value for key, value in schema.items() if key != "anyOf"}
        return one_of([common | option for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema.get("type", "object")
    if isinstance(kinds, list):
        return one_of([schema | {"type": kind} for kind in kinds])
    return values_of_kind(kinds, schema)


def one_of(schemas: list[dict[str, Any]]) -> Strategy:
    """Return a strategy for any of these parts."""
    return st.one_of([found for schema in schemas if (found := values_for(schema)) is not None])


def fields_of(properties: dict[str, Any]) -> dict[str, Strategy]:
    """Return the strategies of an object's fields, without free-form ones."""
    return {key: found for key, part in properties.items() if (found := values_for(part)) is not None}


def values_of_kind(kind: str, schema: dict[str, Any]) -> Strategy | None:
    """Return a strategy for a JSON type."""
    if kind == "object":
        parts = fields_of(schema.get("properties", {}))
        required = {key: parts.pop(key) for key in schema.get("required", []) if key in parts}
        return st.fixed_dictionaries(required, optional=parts) if required or parts else None
    if kind == "array":
        item = values_for(schema.get("items", {}))
        return st.lists(item, max_size=2, unique_by=str) if item is not None else None
    if kind == "string":
        return texts(schema)
    if kind == "integer":
        return st.integers(schema.get("minimum", 0), min(schema.get("maximum", 1000), 100_000))
    if kind == "number":
        lowest = schema.get("exclusiveMinimum", schema.get("minimum", 0))
        return st.floats(lowest, schema.get("maximum", 1000), exclude_min="exclusiveMinimum" in schema)
    return {"boolean": st.booleans(), "null": st.none()}[kind]


def texts(schema: dict[str, Any]) -> Strategy:
    """Return a strategy for texts that fit a pattern, words that YAML reads as something else among them."""
    pattern = re.compile(schema.get("pattern", "^[a-z@/.:_ -]{0,12}$"))
    excluded = re.compile(schema.get("not", {}).get("pattern", r"(?!)"))
    words = [word for word in YAML_WORDS if pattern.search(word) and not excluded.search(word)]
    free = st.from_regex(pattern, alphabet=st.characters(codec="ascii")).filter(
        lambda text: text.isprintable() and len(text) <= schema.get("maxLength", 60) and not excluded.search(text)
    )
    return st.one_of(st.sampled_from(words), free) if words else free


def top_level() -> Strategy:
    """Return a strategy for whole values: one of the three installs of the README, with random other values."""
    parts = fields_of({key: part for key, part in VALUES_SCHEMA["properties"].items() if key not in LEFT_OUT})
    bases = [
        {"demo": True},
        {"weights": {"hubId": "meta-llama/Llama-2-7b-chat-hf"}, "apiKeys": {"secret": "keys"}},
        {"weights": {"existingClaim": "weights"}, "allowUnauthenticated": True, "redis": {"secret": "r"}},
    ]
    return st.builds(
        lambda base, extra: {**extra, **base}, st.sampled_from(bases), st.fixed_dictionaries({}, optional=parts)
    )


def quantity(text: str) -> Decimal:
    """Return the number of a Kubernetes quantity."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert found, text
    return Decimal(found[1]) * UNITS[found[2]]


def check_names_and_labels(manifest: Manifest) -> None:
    """Check what the schemas do not: the forms and lengths of names and labels."""
    name = manifest["metadata"]["name"]
    assert (DNS_LABEL if manifest["kind"] == "Service" else DNS_SUBDOMAIN).fullmatch(name), name
    assert len(name) <= MAX_CHARACTERS.get(manifest["kind"], 253), name
    for metadata in (
        manifest["metadata"],
        manifest["spec"].get("template", {}).get("metadata", {}) if "spec" in manifest else {},
    ):
        for value in metadata.get("labels", {}).values():
            assert LABEL_VALUE.fullmatch(value), value


def check_pod(release: Rendered, pod: Manifest) -> None:
    """Check names of variables, resources, volumes and times of a pod."""
    volumes = [volume["name"] for volume in pod["spec"].get("volumes", [])]
    assert len(set(volumes)) == len(volumes)
    for container in containers_of(pod):
        environment_of(container)  # fails on a variable that is defined twice
        resources = container["resources"]
        for name, amount in resources.get("requests", {}).items():
            assert 0 < quantity(amount) <= quantity(resources["limits"].get(name, amount))
    if pod is release.pod:
        pre_stop = release.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pre_stop <= pod["spec"]["terminationGracePeriodSeconds"]


def is_message(error: helm_python.HelmError) -> bool:
    """Return whether an error is a message of the chart or of its schema, not a failure of the templates."""
    return re.search(r"execution error at .*: \w+[\w.]*: |values don't meet the specifications", str(error)) is not None


def with_random_values(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with random values and names of the release."""
    run = given(values=top_level(), name=st.sampled_from(["llama2", "a" * 53, "true", "7b"]))(test)
    run = settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )(run)
    limited: Callable[..., None] = pytest.mark.timeout(max(600, 2 * EXAMPLES))(run)
    return limited


def render_random(values: Values, name: str) -> Rendered:
    """Return the release; end the example if the chart rejects the values with a message."""
    try:
        return render(values, name)
    except helm_python.HelmError as error:
        if not is_message(error):
            raise
        reject()


@with_random_values
def test_no_values_render_invalid_manifests(values: Values, name: str) -> None:
    """Random values are either rejected by the chart with a message, or render manifests that are valid."""
    release = render_random(values, name)
    for manifest in release.manifests:
        check_names_and_labels(manifest)
        if manifest["kind"] not in CUSTOM:
            validate(manifest, KUBERNETES[-1])
    for claim in release.of("PersistentVolumeClaim"):
        assert quantity(claim["spec"]["resources"]["requests"]["storage"]) > 0
    for pod in release.pods():
        check_pod(release, pod)
