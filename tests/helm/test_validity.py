"""Rendered manifests are valid, for each value set under helm/llama2/ci."""

import json
from pathlib import Path

import helm_python
import jsonschema
import kubernetes_validate
import pytest
from tests.helm.chart import NAMESPACE, VALUE_SETS, Rendered, render, rendered, selects, validate, values_of
from tools.chart import CHART

# The oldest version that Chart.yaml allows, the newest version, and one in between.
KUBERNETES = ("1.30", "1.34", "1.37")
# Kinds of other projects, for which Kubernetes has no schemas. Other tests check the required fields.
CUSTOM = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "GRPCRoute": "gateway.networking.k8s.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
}
INFO = 1


@pytest.mark.parametrize("value_set", VALUE_SETS)
def test_helm_lint_passes(value_set: str) -> None:
    """Helm's strict lint reports no warnings."""
    report = helm_python.lint(CHART, values_of(value_set), strict=True)
    assert report["errors"] == []
    assert [found for found in report["messages"] if found["severity"] > INFO] == []


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_manifests_match_the_schemas_of_kubernetes(release: Rendered, kubernetes: str) -> None:
    """Every manifest is strictly valid in three versions of Kubernetes."""
    if release.values["weights"]["image"]["reference"] and kubernetes == "1.30":
        pytest.skip("image volumes need Kubernetes 1.31, and the chart refuses older ones")
    for manifest in release.manifests:
        if manifest["kind"] in CUSTOM:
            assert manifest["apiVersion"] == CUSTOM[manifest["kind"]]
        else:
            validate(manifest, kubernetes)


def test_invalid_manifests_are_rejected() -> None:
    """The cached schemas reject what `kubernetes_validate` rejects: a wrong type, and an unknown field."""
    (service, _), _ = rendered("demo").services()
    for change in ({"spec": {"ports": "http"}}, {"spec": service["spec"] | {"port": 1}}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(service | change, KUBERNETES[-1], strict=True)
        with pytest.raises(jsonschema.ValidationError):
            validate(service | change, KUBERNETES[-1])


def test_the_oldest_allowed_kubernetes_is_tested() -> None:
    """Chart.yaml allows no version older than the tested ones."""
    assert helm_python.Chart.load(CHART).metadata["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_value_sets_render_every_template() -> None:
    """The value sets cover every template, and every optional manifest can be disabled."""
    templates = {name for value_set in VALUE_SETS for name in rendered(value_set).by_template}
    used = {name for value_set in VALUE_SETS for name, found in rendered(value_set).by_template.items() if found}
    assert used == {name for name in templates if not name.startswith("_")}
    minimum = [manifest["kind"] for manifest in rendered("everything-off").manifests]
    assert sorted(minimum) == ["ConfigMap", "Service", "Service", "StatefulSet"]
    both = rendered("everything-on").manifests + rendered("image-volume").manifests  # a chart has one kind of monitor
    assert {manifest["kind"] for manifest in both} > set(CUSTOM)


def test_names_are_unique_and_labels_name_the_release(release: Rendered) -> None:
    """Names are unique, and all manifests have the release's namespace and labels."""
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in release.manifests]
    assert len(set(names)) == len(names)
    for manifest in release.manifests:
        assert manifest["metadata"]["namespace"] == NAMESPACE
        assert selects({"app.kubernetes.io/instance": "llama2", "app.kubernetes.io/managed-by": "Helm"}, manifest)


def test_long_release_names_are_truncated() -> None:
    """Helm's longest release name results in names that Kubernetes accepts."""
    for release in ("a" * 53, "llama2-" + "b" * 46):
        for manifest in render(values_of("everything-on"), release).manifests:
            assert len(manifest["metadata"]["name"]) <= 63
            if manifest["kind"] not in CUSTOM:
                validate(manifest, KUBERNETES[-1])


def test_the_packaged_chart_renders_the_same(tmp_path: Path) -> None:
    """`helm package` includes every file that templates read, and excludes the value sets."""
    archive = helm_python.package(CHART, destination=tmp_path)
    with helm_python.Chart.load(archive) as packaged:
        values = values_of("everything-on")
        assert json.dumps(packaged.render(values, name="llama2", namespace=NAMESPACE)) == json.dumps(
            helm_python.Chart.load(CHART).render(values, name="llama2", namespace=NAMESPACE)
        )
        assert not [file["name"] for file in packaged.files if file["name"].startswith("ci/")]
