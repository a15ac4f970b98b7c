"""connect-web through Envoy: the gRPC-Web transport works, and the default transport gets the reason for rejection."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.examples.conftest import REPLY, EnvoyMaker
from tests.integration.examples.hosted.environments import install
from tests.support.servers.envoy_server import EXAMPLE

# The test installs the client's packages.
pytestmark = pytest.mark.timeout(600)
UNIMPLEMENTED = 12


async def test_transports(serve_behind_envoy: EnvoyMaker, tmp_path: Path) -> None:
    """Each call by the Connect protocol, in JSON and binary, is UNIMPLEMENTED with the name of the other transport."""
    (environment := tmp_path / "client").mkdir()
    program = install("connect_web.mjs", environment)
    descriptors = tmp_path / "llama2.pb"
    subprocess.run([sys.executable, EXAMPLE / "descriptors.py", descriptors], check=True)
    async with serve_behind_envoy() as (service, envoy):
        results = await program.results(f"http://{envoy.address}", str(descriptors))
        assert results["grpcWeb"] == {"unary": {"text": REPLY}, "stream": {"text": REPLY}}
        for transport in ("connect", "connectBinary"):
            for result in results[transport].values():
                assert result["code"] == UNIMPLEMENTED
                assert "createGrpcWebTransport" in result["message"]
        for method in ("Generate", "GenerateStream"):
            labels = {"method": f"llama2.v1.TextGenerationService/{method}", "code": "OK"}
            assert service.metrics.registry.get_sample_value("llama2_requests_total", labels) == 1
