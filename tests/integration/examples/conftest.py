"""Fixtures of the examples' tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.servers.envoy_server import Envoy, running_envoy
from tests.support.service import Service, ServiceMaker

from llama2_server.engine.text.tokenizer import Tokenizer

REPLY = "Once upon a time."
EnvoyMaker = Any  # returns an AbstractAsyncContextManager[tuple[Service, Envoy]]


@pytest.fixture
def first_token(demo_tokenizer: Tokenizer) -> str:
    """The text of the reply's first token."""
    return demo_tokenizer.decode(demo_tokenizer.encode_raw(REPLY)[1:2])


@pytest.fixture
def serve_behind_envoy(serve_scripted: ServiceMaker, tmp_path: Path) -> EnvoyMaker:
    """Return a function that runs a scripted service behind Envoy; keywords configure the service."""

    @asynccontextmanager
    async def serve(**options: Any) -> AsyncIterator[tuple[Service, Envoy]]:
        async with serve_scripted(REPLY, **options) as service, running_envoy(tmp_path, service.address) as envoy:
            yield service, envoy

    return serve
