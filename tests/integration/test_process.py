"""The server as a process: replies to command-line clients, drains, and the end of the process."""

import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from tests.support.processes import command, environment, server
from tests.support.service import details, health_stub

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc

STORY = "Tell me a story about a fox who lives by the sea."
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the demo model, which the tests of a module share."""
    with server(tmp_path_factory.mktemp("demo")) as (_, address):
        yield address


def test_cli_streams_a_story(demo: str) -> None:
    """`llama2 generate` prints the text of the same greedy request, and its statistics on stderr."""
    call = [str(BIN / "llama2"), "--address", demo, "generate", "--temperature", "0", STORY]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True, env=environment())
    with grpc.insecure_channel(demo) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        reply = stub.Generate(pb.GenerateRequest(prompt=STORY, temperature=0))
    assert done.stdout.strip() == reply.response
    assert f"{reply.completion.usage.output_tokens}" in done.stderr


def test_cli_shows_usage_as_a_table(demo: str) -> None:
    """`llama2 usage` shows today's usage of the account and its remaining quota; `--json` is for scripts."""
    call = [str(BIN / "llama2"), "--address", demo]
    generate = [*call, "generate", "--max-tokens", "3", "--no-cache", "Hello"]
    subprocess.run(generate, capture_output=True, timeout=60, check=True, env=environment())
    table = subprocess.run([*call, "usage"], capture_output=True, text=True, timeout=60, check=True, env=environment())
    first, header, *days = table.stdout.splitlines()
    assert re.match(r"account anonymous: \d+ of \d+ requests per minute left", first)
    counts = ["input", "tokens", "output", "tokens", "cached", "tokens"]
    assert header.split() == ["date", "model", "requests", *counts, "neurons"]
    as_json = subprocess.run([*call, "usage", "--json"], capture_output=True, timeout=60, check=True, env=environment())
    (day,) = json.loads(as_json.stdout)["days"]
    assert days[0].split()[-1] == day["neurons"]
    assert int(day["requests"]) >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_drains_and_exits_with_zero(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM or SIGHUP lets the running request finish and ends the process with exit code 0."""
    with server(tmp_path) as (process, address), grpc.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        state = health_stub(channel).Check(health_pb2.HealthCheckRequest())
        assert state.status == health_pb2.HealthCheckResponse.SERVING
        call = stub.GenerateStream(pb.GenerateRequest(prompt=STORY, temperature=0))
        first = next(call)
        process.send_signal(number)
        last = [first, *call][-1]
        assert last.completion.finish_reason == pb.FINISH_REASON_END_OF_SEQUENCE
        assert process.wait(timeout=60) == 0


def test_nohup_ignores_sighup(tmp_path: Path) -> None:
    """A server that was started with SIGHUP ignored, as by `nohup`, serves on after SIGHUP."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server(tmp_path) as (process, address), grpc.insecure_channel(address) as channel:
            process.send_signal(signal.SIGHUP)
            stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
            assert stub.Generate(pb.GenerateRequest(prompt=STORY, temperature=0)).response
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


@contextlib.contextmanager
def scripted_server(tmp_path: Path, script: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Start a server whose model loading or model hangs; kill it after the test."""
    with subprocess.Popen(
        command(script, "--data-directory", str(tmp_path), *flags, module="tests.support.scripted_process"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def address_of(process: subprocess.Popen[str]) -> str:
    """Wait until the server is SERVING and return its address."""
    assert process.stdout is not None
    serving = re.match(r"SERVING on (\S+)\.", process.stdout.readline())
    assert serving
    return serving[1]


def health_address(process: subprocess.Popen[str]) -> str:
    """Wait until the health port is open and return its address."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"health service listens on ([\d.]+:\d+)", line):
            return found[1]
    raise AssertionError("the process ended without a health port")


def test_health_is_served_while_the_weights_load_until_a_signal(tmp_path: Path) -> None:
    """During loading only `liveness` is SERVING; SIGTERM ends the process with exit code 143."""
    with scripted_server(
        tmp_path, "never-loads", "--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"
    ) as process:
        with grpc.insecure_channel(health_address(process)) as channel:
            for name, status in (
                ("liveness", health_pb2.HealthCheckResponse.SERVING),
                ("", health_pb2.HealthCheckResponse.NOT_SERVING),
                ("llama2.v1.TextGenerationService", health_pb2.HealthCheckResponse.NOT_SERVING),
            ):
                answer = health_stub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
                assert answer.status == status
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert process.stdout is not None
        assert process.stdout.read() == ""  # it never printed SERVING


def test_hung_engine_ends_the_process(tmp_path: Path) -> None:
    """The request gets UNAVAILABLE, its record is in the ledger, and the exit code 70 asks for a restart."""
    with scripted_server(tmp_path, "hangs", "--listen", "127.0.0.1:0") as process:
        with grpc.insecure_channel(address_of(process)) as channel:
            stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as failed:
                list(stub.GenerateStream(pb.GenerateRequest(prompt="Hello", max_tokens=100), timeout=60))
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait(timeout=60) == 70
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
        rows = ledger.execute("SELECT outcome, input_tokens > 0, output_tokens > 0 FROM usage_records").fetchall()
    assert rows == [("UNAVAILABLE", 1, 1)]


def test_dead_device_ends_the_process(tmp_path: Path) -> None:
    """Calls fail with a status, each has a record, and after three failed probes the exit code is 70."""
    codes = []
    with scripted_server(tmp_path, "device-dies", "--listen", "127.0.0.1:0") as process:
        with grpc.insecure_channel(address_of(process)) as channel:
            stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
            for _ in range(3):
                call = stub.GenerateStream(pb.GenerateRequest(prompt="Hello", max_tokens=100, seed=1), timeout=60)
                with pytest.raises(grpc.RpcError):
                    list(call)
                codes.append(call.code())
        assert process.wait(timeout=60) == 70
        assert process.stderr is not None
        assert "3 probes in a row failed" in process.stderr.read()
    assert set(codes) <= {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
        outcomes = [row[0] for row in ledger.execute("SELECT outcome FROM usage_records")]
    assert outcomes.count("INTERNAL") == codes.count(grpc.StatusCode.INTERNAL) > 0
    assert "INTERRUPTED" not in outcomes


# Scripted models generate all these tokens.
ENDLESS = pb.GenerateRequest(prompt="Once", raw=True, max_tokens=900, no_cache=True)


def test_sigkill_leaves_one_interrupted_record(tmp_path: Path) -> None:
    """A request whose server is killed has one record after the restart, with at least the tokens of the last commit.

    A commit follows each 16 tokens; on a busy machine, it can come later than the text.
    """
    committed = 0
    with (
        scripted_server(tmp_path, "blocks", "--listen", "127.0.0.1:0") as process,
        grpc.insecure_channel(address_of(process)) as channel,
    ):
        call = text_generation_pb2_grpc.TextGenerationServiceStub(channel).GenerateStream(ENDLESS)
        with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
            next(call)
            while committed < 32:  # the model blocks after its last text, which can come before the commit
                ((committed,),) = ledger.execute("SELECT output_tokens FROM running_requests").fetchall()
        process.kill()
        process.wait()
    with server(tmp_path) as (restarted, _):
        restarted.send_signal(signal.SIGTERM)
        assert restarted.wait(timeout=60) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
        rows = ledger.execute("SELECT outcome, input_tokens, output_tokens FROM usage_records").fetchall()
    ((outcome, input_tokens, output_tokens),) = rows
    assert outcome == "INTERRUPTED"
    assert input_tokens > 0
    assert output_tokens >= committed


def test_request_longer_than_the_grace_gets_a_status(tmp_path: Path) -> None:
    """It ends with UNAVAILABLE and RetryInfo, not with a closed connection. Its tokens are recorded; exit code 0."""
    flags = ["--listen", "127.0.0.1:0", "--shutdown-grace-seconds", "0.1"]
    with (
        scripted_server(tmp_path, "slow", *flags) as process,
        grpc.insecure_channel(address_of(process)) as channel,
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


def test_second_signal_ends_the_process_immediately(tmp_path: Path) -> None:
    """A second SIGTERM ends the process although a request runs within its grace; the database has the request."""
    flags = ["--listen", "127.0.0.1:0", "--shutdown-grace-seconds", "600"]
    with (
        scripted_server(tmp_path, "blocks", *flags) as process,
        grpc.insecure_channel(address_of(process)) as channel,
    ):
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        call = stub.GenerateStream(ENDLESS)
        next(call)
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING  # the first signal has arrived
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
        assert process.stderr is not None
        *_, last = process.stderr.read().splitlines()
        assert last == "llama2-server: stopped at once by a second signal, SIGTERM"
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as ledger:
        assert ledger.execute("SELECT count(*) FROM running_requests").fetchone() == (1,)
