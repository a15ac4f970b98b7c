"""The containers' commands run as local processes: server, test and weights download."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from tests.helm.chart import Manifest, Rendered, Values, environment_of, render, rendered
from tests.support.processes import command, environment
from tests.support.servers.hub_server import COMMIT, HubServer, Repository, running_hub

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2_client import SyncClient
from llama2_client.receipts import receipt_document, verify_receipt
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.config.settings import Settings
from llama2_server.receipts.keys import public_file, write_new_key

WITH_KEYS: Values = {"demo": True, "apiKeys": {"secret": "keys"}, "test": {"apiKey": {"secret": "key"}}}


@contextmanager
def container_of(release: Rendered, files: dict[str, Path]) -> Iterator[str]:
    """Run a server with a container's environment, free ports and these mounted files; yield its port."""
    settings = {name: files.get(value, value) for name, value in release.env.items()}
    settings |= {name: "0.0.0.0:0" for name in settings if name.endswith("LISTEN")}
    variables = {name: str(value) for name, value in settings.items()}
    with subprocess.Popen(
        command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        serving = re.match(r"SERVING on 0\.0\.0\.0:(\d+)\.", process.stdout.readline())
        try:
            assert serving, process.stderr.read()
            yield serving[1]
        finally:
            process.kill()


def helm_test(pod: Manifest, port: str, secrets: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the test pod's command against a local port."""
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["llama2"]
    arguments = [re.sub(r"^--address=.*", f"--address=127.0.0.1:{port}", argument) for argument in container["args"]]
    variables = {
        name: secrets[value["secretKeyRef"]["name"]] if isinstance(value, dict) else value
        for name, value in environment_of(container).items()
    }
    call = [sys.executable, "-m", "llama2_client.cli", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, check=False, env=environment(**variables))


def test_the_demo_generates(tmp_path: Path) -> None:
    """A server with the demo's environment starts, and the test pod's command generates eight tokens."""
    release = rendered("demo")
    with container_of(release, {"/data": tmp_path}) as port:
        done = helm_test(release.test_pods[0], port, {})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "8 " in done.stderr


def test_with_api_keys_the_test_needs_a_key(tmp_path: Path) -> None:
    """With the API keys Secret mounted, the server requires a key; the test pod sends the key of its Secret."""
    release = render(WITH_KEYS)
    key, line = new_key("tests")
    api_keys_file = tmp_path / "keys.yaml"
    api_keys_file.write_text(f"keys:\n  {line}\n")
    with container_of(release, {"/data": tmp_path, "/etc/llama2/keys/keys.yaml": api_keys_file}) as port:
        done = helm_test(release.test_pods[0], port, {"key": key})
        assert done.returncode == 0, done.stderr
        done = helm_test(release.test_pods[0], port, {"key": "l2_wrong"})
        assert done.returncode == 5


def test_the_mounted_secret_signs_receipts(tmp_path: Path) -> None:
    """The Secret has the key and earlier public keys; the server signs with the first and lists them all."""
    secret, old = tmp_path / "secret", tmp_path / "old.key"
    secret.mkdir()
    write_new_key(secret / "receipts.key")
    write_new_key(old)
    public_file(old).rename(secret / "old.pub")
    release = render({"demo": True, "receipts": {"secret": "receipts"}})
    (tmp_path / "data").mkdir()
    mounted = {"/etc/llama2/receipts": secret, "/etc/llama2/receipts/receipts.key": secret / "receipts.key"}
    with container_of(release, {"/data": tmp_path / "data", **mounted}) as port:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            card = model_pb2_grpc.ModelServiceStub(channel).GetModelCard(model_pb2.GetModelCardRequest())
        with SyncClient(f"127.0.0.1:{port}") as client:
            document = receipt_document(client.generate("a story", max_tokens=2))
    assert len(card.receipt_keys) == 2
    verify_receipt(document, [card.receipt_keys[0].public_key])


def start(container: Manifest, volume: Path, **variables: str) -> "subprocess.Popen[str]":
    """Start the command of a container, with a directory in place of the volume of the weights."""
    arguments = [argument.replace("=/weights/", f"={volume}/") for argument in container["args"]]
    call = command(*container["command"][1:], *arguments)
    pipe = subprocess.PIPE
    return subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, env=environment(**variables))


@contextmanager
def hub_of(release: Rendered) -> Iterator[HubServer]:
    """Run a Hub that has the repository of the values, with small files."""
    weights = release.values["weights"]
    files = {"config.json": b"{}", "model.safetensors": b"tensors"}
    with running_hub() as hub:
        hub.repositories = {weights["hubId"]: Repository(files, commit=weights["revision"] or COMMIT)}
        yield hub


def served_weights(release: Rendered, volume: Path) -> bytes:
    """Return the weights in the directory of the server's setting, in the volume."""
    served = Settings.model_validate({"card": "x", "weights": release.env["LLAMA2_WEIGHTS"]}).weights
    assert served is not None
    return (volume / Path(served).name / "model.safetensors").read_bytes()


def test_the_init_container_downloads_the_served_weights(tmp_path: Path) -> None:
    """The container's command downloads the repository to the directory of the server's setting."""
    release = rendered("production-gpu")
    (init,) = release.pod["spec"]["initContainers"]
    with hub_of(release) as hub, start(init, tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home")) as process:
        assert process.wait(60) == 0, process.communicate()
    assert served_weights(release, tmp_path) == b"tensors"


def test_one_download_serves_waiting_replicas(tmp_path: Path) -> None:
    """The commands of the Job and of two pods, which wait for it, end with the complete checkpoint, fetched once."""
    release = rendered("download-job")
    (job,) = release.one("Job")["spec"]["template"]["spec"]["containers"]
    (init,) = release.pod["spec"]["initContainers"]
    with hub_of(release) as hub, start(init, tmp_path) as first, start(init, tmp_path) as second:
        for waiting in (first, second):
            assert waiting.stdout is not None
            assert waiting.stdout.readline().startswith("waiting for the download of meta-llama/")
        with start(job, tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home")) as downloading:
            assert downloading.wait(60) == 0, downloading.communicate()
        assert [waiting.wait(60) for waiting in (first, second)] == [0, 0]
        assert sorted(hub.downloads) == ["config.json", "model.safetensors"]
    assert served_weights(release, tmp_path) == b"tensors"
