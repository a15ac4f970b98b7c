"""The pod of `helm test`, and the notes after an install."""

import math

import pytest
from tests.helm.chart import NAMESPACE, Rendered, environment_of, rendered


def test_the_test_pod_authenticates_like_a_client(release: Rendered) -> None:
    """`helm test` generates through the Service, with an API key or client certificate if required."""
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
def test_the_chart_has_a_test_only_if_it_can_pass(value_set: str, tested: bool) -> None:
    """With apiKeys but without test.apiKey, the chart has no test, and the notes give the reason."""
    assert bool(rendered(value_set).test_pods) is tested
    assert ("test.apiKey.secret" in rendered(value_set).notes) is not tested


def test_notes_show_how_to_get_a_first_reply() -> None:
    """The notes after an install name the addresses, the commands and the shutdown grace."""
    notes = rendered("demo").notes
    assert f"llama2-headless.{NAMESPACE}.svc:50051" in notes
    assert "port-forward service/llama2 50051:50051" in notes
    assert "llama2 generate" in notes
    assert f"up to {math.ceil(1024 * 0.1)} s" in notes
    assert "No API keys are set" in notes
    assert "No API keys are set" not in rendered("production-gpu").notes
