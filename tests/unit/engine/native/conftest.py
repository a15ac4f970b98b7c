"""The instruction sets that native tests run on."""

import platform

import pytest
from tests.unit.engine.native.models import library


@pytest.fixture(params=["NEON"] if platform.machine() in ("aarch64", "arm64") else ["AVX-512", "AVX2"])
def instructions(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn; the test is skipped if this processor does not support it."""
    name: str = request.param
    if library().llama2_instructions(name.encode()) is None:
        pytest.skip(f"NOT TESTED: this processor does not support {name}")
    return name
