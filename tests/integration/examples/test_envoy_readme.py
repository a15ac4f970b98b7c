"""The README of `examples/envoy`: its commands and its TLS configuration."""

import contextlib
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import httpx2
import yaml
from tests.integration.examples.conftest import REPLY, EnvoyMaker
from tests.support.certificates import Authority
from tests.support.servers.envoy_server import DESCRIPTORS, EXAMPLE, copy_example, envoy_command, running_envoy
from tests.support.service import ServiceMaker

from llama2_client import Client


def code_blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    readme = (EXAMPLE / "README.md").read_text()
    return [textwrap.dedent(block) for block in re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```", readme)]


def test_the_readmes_commands_accept_the_configuration(tmp_path: Path) -> None:
    """`python descriptors.py llama2.pb` and `envoy -c envoy.yaml` run exactly as written, on the unchanged files."""
    envoy = Path(envoy_command())
    copy = Path(shutil.copytree(EXAMPLE, tmp_path / "envoy", ignore=shutil.ignore_patterns("*.pb")))
    path = f"{Path(sys.executable).parent}:{envoy.parent}:{os.environ['PATH']}"
    lines = [line.partition("#")[0].strip() for line in code_blocks("sh")[0].splitlines()]
    (build,) = [line for line in lines if line.startswith("python ")]
    (run,) = [line for line in lines if line.startswith("envoy ")]
    assert build.split()[1:] == DESCRIPTORS
    for command in (build, f"{run} --mode validate"):
        done = subprocess.run(
            command.split(), cwd=copy, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "configuration 'envoy.yaml' OK" in done.stdout + done.stderr


async def test_the_readmes_curl_commands(serve_behind_envoy: EnvoyMaker) -> None:
    """Each curl command of the README, sent as curl would send it, succeeds."""
    commands = [shlex.split(line) for line in code_blocks("sh")[1].splitlines()]
    assert len(commands) > 4
    async with serve_behind_envoy() as (_, envoy):
        for curl, url, flag, body, *rest in commands:
            assert (curl, flag) == ("curl", "--json")
            headers = dict(word.split(": ") for word in rest if ": " in word)
            headers = {key: value.encode("ascii", "ignore").decode() for key, value in headers.items()}
            reply = await envoy.post(body, url.removeprefix("http://127.0.0.1:8080"), **headers)
            assert reply.status_code == 200, reply.text
            streamed = json.loads(body).get("stream", False)
            assert reply.headers["content-type"] == ("text/event-stream" if streamed else "application/json")


async def test_the_readmes_tls(serve_scripted: ServiceMaker, tmp_path: Path, authority: Authority) -> None:
    """With the README's `transport_socket`, the same port serves HTTPS and gRPC over TLS."""
    certificate, key = authority.pair()
    (block,) = code_blocks("yaml")
    tls = block.replace("tls.crt", str(certificate)).replace("tls.key", str(key))
    async with (
        serve_scripted(REPLY) as service,
        running_envoy(tmp_path, service.address, filter_chain=yaml.safe_load(tls)) as envoy,
        httpx2.AsyncClient(verify=ssl.create_default_context(cafile=authority.root_file()), trust_env=False) as https,
        Client(envoy.address, tls=authority.root) as client,
    ):
        reply = await https.post(f"https://{envoy.address}/v1/generate", json={"prompt": "hi"})
        assert reply.json()["response"] == REPLY
        assert (await client.generate("hi")).text == REPLY


def start(command: list[str], folder: Path, stack: ExitStack) -> subprocess.Popen[str]:
    """Start an Envoy and wait until it serves; it is stopped with the stack."""
    process = stack.enter_context(subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if "starting main dispatch loop" in line:
            return process
    raise AssertionError("".join(log))


def test_it_starts_next_to_another_envoy(tmp_path: Path) -> None:
    """Another Envoy has the default base id and the usual admin port; the README's command starts a second one, twice.

    The second start follows a kill, which leaves the admin socket behind.
    """
    envoy = envoy_command()
    (tmp_path / "other").mkdir()
    admin = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 9901}}}
    (tmp_path / "other/envoy.yaml").write_text(yaml.safe_dump({"admin": admin}))
    copy = copy_example(tmp_path)
    config = yaml.safe_load((copy / "envoy.yaml").read_text())
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"]["port_value"] = 0
    (copy / "envoy.yaml").write_text(yaml.safe_dump(config))
    lines = [line.partition("#")[0].strip() for line in code_blocks("sh")[0].splitlines()]
    (run,) = [line for line in lines if line.startswith("envoy ")]
    with ExitStack() as stack:
        with contextlib.suppress(AssertionError):  # an Envoy of this machine may already use them
            start([envoy, "-c", "envoy.yaml"], tmp_path / "other", stack)
        for _ in range(2):
            process = start([envoy, *run.split()[1:], "--concurrency", "1"], copy, stack)
            process.kill()
            process.wait()
            assert (copy / "admin.sock").exists()
