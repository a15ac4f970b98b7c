"""The README of `examples/envoy`: its commands and its TLS configuration."""

import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx2
import yaml
from tests.integration.examples.conftest import REPLY, EnvoyMaker
from tests.support.certificates import Authority
from tests.support.servers.envoy_server import DESCRIPTORS, EXAMPLE, envoy_command, running_envoy
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
