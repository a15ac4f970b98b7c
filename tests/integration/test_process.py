"""The server as a process: how it starts, refuses to start, and ends."""

import contextlib
import json
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2
from tests.support.processes import command, environment, server
from tests.support.service import details, health_stub

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server import app
from llama2_server.api.server import METHODS
from llama2_server.config.settings import Settings

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


def test_what_is_printed_to_try_works(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside SERVING stand three commands: two of our own, which answer as they stand there, and one of grpcurl."""
    app._say_serving(Settings.model_validate({}), demo)
    generate, chat, grpcurl = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[2:5])
    for words, typed in ((generate, ""), (chat, "Tell me a story.\n")):
        call = [str(BIN / "llama2"), *words[1:]]
        done = subprocess.run(
            call, input=typed, capture_output=True, text=True, timeout=60, env=environment(), check=True
        )
        assert len(done.stdout.split()) > 20
    flag, body, address, method = grpcurl[2:]
    assert (grpcurl[:2], flag, address) == (["grpcurl", "-plaintext"], "-d", demo)
    assert ParseDict(json.loads(body), pb.GenerateRequest()) == pb.GenerateRequest(prompt=STORY)
    assert method in METHODS


def test_cli_shows_usage_as_a_table(demo: str) -> None:
    """`llama2 usage` shows what this account has used today and what is left of its quota; --json for scripts."""
    call = [str(BIN / "llama2"), "--address", demo]
    ask = [*call, "generate", "--max-tokens", "3", "--no-cache", "Hello"]
    subprocess.run(ask, capture_output=True, timeout=60, check=True, env=environment())
    table = subprocess.run([*call, "usage"], capture_output=True, text=True, timeout=60, check=True, env=environment())
    first, header, *days = table.stdout.splitlines()
    assert re.match(r"account anonymous: \d+ of \d+ requests per minute left", first)
    counts = ["input", "tokens", "output", "tokens", "cached", "tokens"]
    assert header.split() == ["date", "model", "requests", *counts, "neurons"]
    told = subprocess.run([*call, "usage", "--json"], capture_output=True, timeout=60, check=True, env=environment())
    (day,) = json.loads(told.stdout)["days"]
    assert days[0].split()[-1] == day["neurons"]
    assert int(day["requests"]) >= 1


# With a seed that is known to reach max_tokens: at random the end of the sequence may come as the fifth token.
ENDLESS = pb.GenerateRequest(prompt="Once", raw=True, temperature=5, max_tokens=900, seed=6, no_cache=True)


def test_sigkill_leaves_one_interrupted_record(tmp_path: Path) -> None:
    """A request that runs when its server is killed has one record after the restart, short of at most 16 tokens."""
    with server(tmp_path) as (process, address), grpc.insecure_channel(address) as channel:
        call = text_generation_pb2_grpc.TextGenerationServiceStub(channel).GenerateStream(ENDLESS)
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
        (["--weights", "/no/such/directory"], {}, "--weights: /no/such/directory: not a directory and not an org/name"),
        (["--weights", "."], {}, "--weights: tokenizer.model: no such file; copy it from the Llama-2 checkpoint"),
        (["--shutdown-grace-seconds", "-1"], {}, "shutdown_grace_seconds (--shutdown-grace-seconds): "),
        (["--api-keys-file", "/no/such/keys"], {}, "keys file /no/such/keys: cannot be read"),
        (["--usage-url", "mysql://here"], {}, "usage_url: "),
        (["--redis-url", "http://here"], {}, "redis_url: "),
        (["--lisen", "x"], {}, "--lisen: there is no such flag; did you mean --listen?"),
        # Before the weights, which take minutes.
        (["--redis-url", "http://here", "--weights", "/no/such/directory"], {}, "redis_url: "),
        (["--usage-url", "mysql://here", "--weights", "/no/such/directory"], {}, "usage_url: "),
        (["--tls-certificate", "/no/such", "--tls-key", "/no/such"], {}, "tls_certificate: /no/such: No such file"),
        (["--tls-key", "/no/such"], {}, "tls_certificate: TLS needs both"),
        (["--metrics-listen", "192.0.2.1:1"], {}, "--metrics-listen: cannot listen on 192.0.2.1:1"),
        (
            ["--otlp-endpoint", "localhost:4317"],
            {},
            "--otlp-endpoint: localhost:4317 is not a valid endpoint; use http://HOST:PORT",
        ),
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
    assert all(json.loads(line)["level"] == "info" for line in logged)
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
    assert done.stderr.splitlines()[-1].startswith(f"llama2-server: --listen: cannot listen on 127.0.0.1:{taken_port};")


@contextlib.contextmanager
def started(tmp_path: Path, how: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A server whose load or model misbehaves; it does not outlive the test."""
    with subprocess.Popen(
        command(how, "--data-directory", str(tmp_path), *flags, module="tests.support.scripted_process"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def serves_health(process: subprocess.Popen[str]) -> str:
    """The address of the health port, when it is open."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"health on ([\d.]+:\d+)", line):
            return found[1]
    raise AssertionError("no health port")


def test_health_answers_while_the_weights_load_and_a_signal_ends_that(tmp_path: Path) -> None:
    """`liveness` is SERVING and everything else is not, for as long as it takes; SIGTERM ends the process with 0."""
    with started(tmp_path, "never-loads", "--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0") as process:
        with grpc.insecure_channel(serves_health(process)) as channel:
            for name, status in (
                ("liveness", health_pb2.HealthCheckResponse.SERVING),
                ("", health_pb2.HealthCheckResponse.NOT_SERVING),
                ("llama2.v1.TextGenerationService", health_pb2.HealthCheckResponse.NOT_SERVING),
            ):
                answer = health_stub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
                assert answer.status == status
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""  # it never said SERVING


def test_a_signal_ends_a_warm_up(tmp_path: Path) -> None:
    """SIGTERM ends a server with 0 that has loaded and does not come through its first generation."""
    with started(tmp_path, "hangs-in-the-warm-up", "--listen", "127.0.0.1:0") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the first step\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == ""  # it never said SERVING


def test_an_engine_that_hangs_ends_the_process_for_a_restart(tmp_path: Path) -> None:
    """The call gets UNAVAILABLE, its record is in the ledger, and the exit code says that a restart will help."""
    flags = ["--listen", "127.0.0.1:0", "--engine-step-timeout-seconds", "1"]
    with started(tmp_path, "hangs", *flags) as process:
        assert process.stdout is not None
        serving = re.match(r"SERVING on (\S+)\.", process.stdout.readline())
        assert serving
        with grpc.insecure_channel(serving[1]) as channel:
            stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as failed:
                list(stub.GenerateStream(pb.GenerateRequest(prompt="Hello", max_tokens=100), timeout=60))
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait(timeout=30) == 70
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
        rows = ledger.execute("SELECT outcome, input_tokens > 0, output_tokens > 0 FROM usage_records").fetchall()
    assert rows == [("UNAVAILABLE", 1, 1)]


def test_a_call_that_outlasts_the_grace_is_told_so(tmp_path: Path) -> None:
    """It ends with UNAVAILABLE and RetryInfo instead of a cut connection; its tokens are recorded; exit code 0."""
    with (
        server(tmp_path, "--shutdown-grace-seconds", "0.1") as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        call = text_generation_pb2_grpc.TextGenerationServiceStub(channel).GenerateStream(ENDLESS)
        next(call)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as cut:
            list(call)
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(cut.value)["RetryInfo"]  # type: ignore[arg-type]
        assert process.wait(timeout=60) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
        ((outcome, output_tokens),) = ledger.execute("SELECT outcome, output_tokens FROM usage_records").fetchall()
    assert outcome == "UNAVAILABLE"
    assert output_tokens > 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """While a call would still run for its grace, the second SIGTERM ends the process; the journal has the call."""
    with (
        server(tmp_path, "--shutdown-grace-seconds", "600") as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        calls = [stub.GenerateStream(ENDLESS) for _ in range(2)]
        next(calls[0])
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING  # it has heard the first one
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 130
    assert list((tmp_path / "journal").glob("*.journal"))


def test_stores_are_checked_before_torch_is_there() -> None:
    """A wrong URL or file is refused in no more time than it takes to read the settings: torch takes seconds."""
    look = "import sys, llama2_server.lifecycle.preflight, llama2_server.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == "False\n"
