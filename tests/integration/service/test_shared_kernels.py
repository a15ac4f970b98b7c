"""Two servers on one machine with one Redis, whose kernels give different texts for a seed."""

from pathlib import Path

import grpc
from tests.support.processes import server
from tests.support.servers.redis_server import running_redis

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2_client import SyncClient


def wait_for_fingerprint(address: str) -> None:
    """Ask for the card until the server has hashed its weights."""
    with grpc.insecure_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        while not stub.GetModelCard(model_pb2.GetModelCardRequest()).execution.fingerprint:
            pass


def test_replicas_with_other_kernels_share_no_replies(tmp_path: Path) -> None:
    """The native server's reply is never the torch server's, whose fingerprint differs; it is a hit after a restart."""
    found = []
    with running_redis(tmp_path) as redis:
        for index, kernels in enumerate(("auto", "torch", "auto")):
            folder = tmp_path / str(index)
            folder.mkdir()
            flags = ["--cpu-kernels", kernels, "--redis-url", redis.url, "--device", "cpu"]
            with server(folder, *flags, "--max-free-calls-per-minute", str(10**9)) as (_, address):
                wait_for_fingerprint(address)
                with SyncClient(address) as client:
                    found.append(client.generate("a story", seed=7, max_tokens=64))
    assert [reply.cached for reply in found] == [False, False, True]
    assert found[0].fingerprint == found[2].fingerprint != found[1].fingerprint
    assert found[0].text == found[2].text
