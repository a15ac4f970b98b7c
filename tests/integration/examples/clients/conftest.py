"""Fixtures of the client programs' tests."""

import shutil
from pathlib import Path

import pytest
from tests.integration.examples.clients.client_program import (
    TOOLCHAINS,
    ClientProgram,
    require_toolchain,
)
from tests.integration.examples.clients.web_page import WebPage
from tests.support.repository import ROOT


@pytest.fixture(scope="session", params=TOOLCHAINS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ClientProgram:
    """The chat program of each language, built once with its README's commands."""
    require_toolchain(request.param)
    checkout: Path = tmp_path_factory.mktemp(request.param)
    ignored = shutil.ignore_patterns("node_modules", "build", "*_pb2*")
    for folder in ("examples/clients", "protos"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignored)
    kind = WebPage if request.param == "browser" else ClientProgram
    built = kind(request.param, checkout)
    built.build()
    return built
