"""A real API server accepts what random values render, as tests/helm/test_fuzz.py proves with schemas."""

from hypothesis import assume
from tests.cluster.namespaces import Namespace, missing
from tests.helm.chart import Values
from tests.helm.test_fuzz import render_random, with_random_values


@with_random_values
def test_the_server_accepts_random_values(open_namespace: Namespace, values: Values, name: str) -> None:
    """The manifests of random values pass a dry run of Helm, and of the API server with strict validation."""
    release = render_random(values, name)
    assume(not missing(open_namespace.cluster, release))
    for manifest in open_namespace.install(values, name, dry_run="server"):
        open_namespace.client.create(manifest, dry_run=True)
