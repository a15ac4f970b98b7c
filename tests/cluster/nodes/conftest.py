"""Fixtures of the tests with a node, on which pods run."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.node.isolation import skip_unless_isolated
from tests.support.node.kubernetes_node import Node, running_node
from tests.support.servers.cluster_assets import REASON, assets


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """Return a running node with the server's image; skip the test without the programs or the namespaces."""
    programs = assets()
    if programs is None:
        pytest.skip(REASON)
    skip_unless_isolated()
    # Not pytest's folder: a socket's path has a limit, and the image would be kept for two more sessions.
    folder = Path(tempfile.mkdtemp(prefix="node-"))
    try:
        with running_node(programs, folder) as node:
            yield node
    finally:
        shutil.rmtree(folder)
