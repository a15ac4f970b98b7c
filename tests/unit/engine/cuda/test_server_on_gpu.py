"""The unmodified server on a GPU, with the demo model of the repository, over a socket."""

from pathlib import Path

import grpc
import pytest
import torch
from tests.support.processes import server

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2_client import SyncClient

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no NVIDIA GPU found"),
    pytest.mark.timeout(300),  # kernels are compiled
]


def test_a_restart_keeps_kernels_and_texts(tmp_path: Path) -> None:
    """Both starts serve in CUDA graphs; the second one uses the stored variants: equal fingerprint, equal texts."""
    first, second = (_start_and_generate(tmp_path) for _ in range(2))
    assert first == second
    fingerprint, texts = first
    assert len(fingerprint) == 64
    assert all(texts)
    assert "slower" not in (tmp_path / "server.log").read_text()


def _start_and_generate(folder: Path) -> tuple[str, list[str]]:
    """Start the server and return its fingerprint and the texts of a greedy and of a sampled request."""
    with server(folder, "--device", DEVICE) as (_, address), SyncClient(address) as client:
        with grpc.insecure_channel(address) as channel:
            service = model_pb2_grpc.ModelServiceStub(channel)
            execution = service.GetModelCard(model_pb2.GetModelCardRequest()).execution
            while not execution.fingerprint:  # the weights are being hashed
                execution = service.GetModelCard(model_pb2.GetModelCardRequest()).execution
        assert execution.step_kind == model_pb2.STEP_KIND_CUDA_GRAPHS
        assert execution.device.startswith(DEVICE)
        replies = [
            client.generate("Tell me a story about a llama.", max_tokens=60, no_cache=True, **sampling)
            for sampling in ({"temperature": 0.0}, {"seed": 5})
        ]
        assert {reply.fingerprint for reply in replies} == {execution.fingerprint}
        return execution.fingerprint, [reply.text for reply in replies]
