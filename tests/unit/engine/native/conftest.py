"""The instruction sets that native tests run on."""

import platform

import pytest
from tests.unit.engine.native.models import supported

PORTABLE = ["NEON"] if platform.machine() in ("aarch64", "arm64") else ["AVX-512", "AVX2"]


@pytest.fixture(params=PORTABLE)
def portable_instructions(request: pytest.FixtureRequest) -> str:
    """Each instruction set of the portable kernels; the test is skipped if this processor does not support it."""
    return supported(request.param)


@pytest.fixture(params=[*PORTABLE, "AMX"])
def instructions(request: pytest.FixtureRequest) -> str:
    """Each instruction set of both families; the test is skipped if this processor does not support it."""
    return supported(request.param)
