"""The server as a process: how it starts, refuses to start, and ends."""

import contextlib
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from tests.processes import command, environment, server
from tests.service import health_stub

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc

STORY = "Tell me a story about a fox who lives by the sea."
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one server with the demo model."""
    with server(tmp_path_factory.mktemp("demo")) as (_, address):
        yield address


def test_bufcurl_streams_a_story(demo: str) -> None:
    """`buf curl`, like grpcurl, finds the method by reflection and streams the story."""
    url = f"http://{demo}/llama2.v1.TextGenerationService/GenerateStream"
    body = f'{{"prompt": "{STORY}", "temperature": 0}}'
    call = [str(BIN / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", body, url]
    printed = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout
    text = "".join(re.findall(r'"response":\s*"(.*?)"', printed))
    assert "fox" in text
    assert "sea" in text
    assert "FINISH_REASON_END_OF_SEQUENCE" in printed


def test_cli_streams_a_story(demo: str) -> None:
    """`llama2 generate` prints the same story, greedy, and its figures on stderr."""
    call = [str(BIN / "llama2"), "--address", demo, "generate", "--temperature", "0", STORY]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True, env=environment())
    with grpc.insecure_channel(demo) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        reply = stub.Generate(pb.GenerateRequest(prompt=STORY, temperature=0))
    assert done.stdout.strip() == reply.response
    assert f"{reply.completion.usage.output_tokens}" in done.stderr


def test_cli_shows_usage_as_a_table(demo: str) -> None:
    """`llama2 usage` shows what this account has used today and what is left of its quota; --json for scripts."""
    call = [str(BIN / "llama2"), "--address", demo]
    ask = [*call, "generate", "--max-tokens", "3", "--no-cache", "Hello"]
    subprocess.run(ask, capture_output=True, timeout=60, check=True, env=environment())
    table = subprocess.run([*call, "usage"], capture_output=True, text=True, timeout=60, check=True, env=environment())
    first, header, *days = table.stdout.splitlines()
    assert re.match(r"account anonymous: \d+ of \d+ requests a minute left", first)
    assert header.split() == ["date", "model", "requests", "tokens", "in", "tokens", "out", "from", "cache", "neurons"]
    told = subprocess.run([*call, "usage", "--json"], capture_output=True, timeout=60, check=True, env=environment())
    (day,) = json.loads(told.stdout)["days"]
    assert days[0].split()[-1] == day["neurons"]
    assert int(day["requests"]) >= 1


def test_sigkill_leaves_one_interrupted_record(tmp_path: Path) -> None:
    """A request that runs when its server is killed has one record after the restart, short of at most 16 tokens."""
    request = pb.GenerateRequest(prompt="Once", raw=True, temperature=5, max_tokens=900)
    with server(tmp_path) as (process, address), grpc.insecure_channel(address) as channel:
        call = text_generation_pb2_grpc.TextGenerationServiceStub(channel).GenerateStream(request)
        texts = [next(call).response for _ in range(40)]
        process.kill()
        assert len(texts) == 40
    with server(tmp_path) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
        rows = ledger.execute("SELECT outcome, input_tokens, output_tokens FROM usage_records").fetchall()
    ((outcome, input_tokens, output_tokens),) = rows
    assert outcome == "INTERRUPTED"
    assert input_tokens > 0
    assert output_tokens > 40 - 16


def test_sigterm_drains_and_exits_with_zero(tmp_path: Path) -> None:
    """SIGTERM with nothing running ends the process cleanly."""
    with server(tmp_path) as (process, address):
        with grpc.insecure_channel(address) as channel:
            state = health_stub(channel).Check(health_pb2.HealthCheckRequest())
            assert state.status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_sigterm_lets_a_running_call_finish(tmp_path: Path) -> None:
    """A story that is being told when SIGTERM comes is told to its end."""
    with server(tmp_path) as (process, address), grpc.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        call = stub.GenerateStream(pb.GenerateRequest(prompt=STORY, temperature=0))
        first = next(call)
        process.send_signal(signal.SIGTERM)
        last = [first, *call][-1]
        assert last.completion.finish_reason == pb.FINISH_REASON_END_OF_SEQUENCE
        assert process.wait(timeout=30) == 0


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "extra", "words"),
    [
        (["--listen", "here"], {}, "must be HOST:PORT"),
        (["--listen", "0.0.0.0:1"], {}, "listen: 0.0.0.0:1 is not loopback"),
        ([], {"LLAMA2_LISTEN": "nowhere:x"}, "must be HOST:PORT"),
        (["--card", "no-such-card"], {}, "weights: this card needs them"),
        (["--card", "no-such-card", "--weights", "."], {}, "card no-such-card: cannot be read"),
        (["--weights", "/no/such/directory"], {}, "/no/such/directory: no such directory"),
        (["--weights", "."], {}, "tokenizer.model: no such file"),
        (["--grace-seconds", "-1"], {}, "grace_seconds (--grace-seconds): "),
        (["--keys-file", "/no/such/keys"], {}, "keys file /no/such/keys: cannot be read"),
        (["--ledger-url", "mysql://here"], {}, "ledger_url: "),
        (["--redis-url", "http://here"], {}, "redis_url: "),
        (["--lisen", "x"], {}, "--lisen: there is no such flag; did you mean --listen?"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path: Path, flags: list[str], extra: dict[str, str], words: str) -> None:
    """What cannot be served is refused with exit code 2 and one line that names it."""
    variables = environment(**extra, XDG_STATE_HOME=str(tmp_path))
    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=60, env=variables, check=False)
    assert done.returncode == 2
    *logged, last = done.stderr.splitlines()
    assert last.startswith("llama2-server: ")
    assert words in last
    assert all(" INFO " in line for line in logged)
    assert done.stdout == ""


def test_port_in_use_is_named(tmp_path: Path, taken_port: int) -> None:
    """A port that somebody else listens on is refused with exit code 2 and the address."""
    done = subprocess.run(
        command("--listen", f"127.0.0.1:{taken_port}", "--data-directory", str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"llama2-server: listen: cannot listen on 127.0.0.1:{taken_port}")
