"""A real API server accepts what random values render, as tests/helm/test_fuzz.py proves with schemas."""

import helm_python
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.cluster.namespaces import Namespace, missing
from tests.helm.chart import Values, render
from tests.helm.test_fuzz import EXAMPLES, is_message, top_level


@pytest.mark.timeout(max(600, 2 * EXAMPLES))
@given(values=top_level(), name=st.sampled_from(["llama2", "a" * 53, "true", "7b"]))
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_the_server_accepts_random_values(open_namespace: Namespace, values: Values, name: str) -> None:
    """The manifests of random values pass a dry run of Helm, and of the API server with strict validation."""
    try:
        release = render(values, name)
    except helm_python.HelmError as error:
        if not is_message(error):
            raise
        assume(False)
    assume(not missing(open_namespace.cluster, release))
    for manifest in open_namespace.install(values, name, dry_run="server"):
        open_namespace.client.create(manifest, dry_run=True)
