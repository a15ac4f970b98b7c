"""The whole comparison of native sampling with the reference sampler; the unit tests have a small one."""

import pytest
from tests.support.sampling.sampling_cases import compare
from tests.unit.engine.native.models import library

CASES = 100_000


@pytest.mark.timeout(1800)
def test_tokens_equal_the_reference() -> None:
    """100,000 cases give the same token, except for numbers within 1e-12 of a boundary, which are counted."""
    library()
    found = compare(CASES, seed=0)
    print(f"{found.different} of {found.cases} tokens differ next to a boundary")
    assert found.cases >= CASES
    # The test itself puts one number in ten that close to a boundary.
    assert found.different < CASES / 10
