"""Fixtures of the chart's tests."""

import pytest
from tests.helm.chart import VALUE_SETS, Rendered, rendered


@pytest.fixture(params=VALUE_SETS)
def release(request: pytest.FixtureRequest) -> Rendered:
    """The manifests of each value set."""
    return rendered(str(request.param))
