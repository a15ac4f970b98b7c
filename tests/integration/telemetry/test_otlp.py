"""Traces from a server process to a real OTLP receiver, and servers without the OpenTelemetry libraries."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from tests.support.processes import environment, server

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.telemetry.errors import TelemetryError
from llama2_server.telemetry.telemetry import check_endpoint

TRACE = "0af7651916cd43dd8448eb211c80319c"
WITHOUT_OTEL = """
import sys
sys.modules["opentelemetry"] = None
from llama2_server.__main__ import main
main()
"""


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A receiver that keeps the spans."""

    def __init__(self) -> None:
        self.resources: list[trace_pb2.ResourceSpans] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.resources += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> Iterator[trace_pb2.Span]:
        for resource in self.resources:
            for scope in resource.scope_spans:
                yield from scope.spans


@contextmanager
def receiving() -> Iterator[tuple[Receiver, str]]:
    """Run an OTLP receiver, and return it with its endpoint."""
    receiver = Receiver()
    listener = grpc.server(ThreadPoolExecutor(2))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(receiver, listener)
    port = listener.add_insecure_port("127.0.0.1:0")
    listener.start()
    try:
        yield receiver, f"http://127.0.0.1:{port}"
    finally:
        listener.stop(None).wait()


def generate(address: str) -> pb.GenerateResponse:
    metadata = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)
    with grpc.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        return stub.Generate(pb.GenerateRequest(prompt="Hello", max_tokens=5), metadata=metadata)


def log_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "server.log").read_text().splitlines()]


def attributes(pairs: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in pairs}


def test_spans_reach_an_otlp_receiver(tmp_path: Path) -> None:
    """Spans are sent by OTLP, the last ones in the drain; the request's log record names the same trace."""
    with receiving() as (receiver, endpoint), server(tmp_path, "--otlp-endpoint", endpoint) as (process, address):
        request_id = generate(address).completion.request_id
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    names = [span.name for span in receiver.spans()]
    assert sorted(names) == ["decode", "llama2.v1.TextGenerationService/Generate", "prefill", "queue", "validation"]
    assert {span.trace_id.hex() for span in receiver.spans()} == {TRACE}
    (service,) = {attributes(resource.resource.attributes)["service.name"] for resource in receiver.resources}
    assert service == "llama2-grpc"
    (record,) = (record for record in log_records(tmp_path) if record["event"] == "request")
    (root,) = (span for span in receiver.spans() if span.kind == trace_pb2.Span.SPAN_KIND_SERVER)
    assert (record["trace_id"], record["span_id"], record["request_id"]) == (TRACE, root.span_id.hex(), request_id)


def test_unavailable_receiver_blocks_neither_calls_nor_the_exit(tmp_path: Path) -> None:
    """Without a receiver, calls are served and the process exits normally."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with server(tmp_path, "--otlp-endpoint", endpoint) as (process, address):
            assert generate(address).completion.usage.output_tokens == 5
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0


def without_otel(*flags: str) -> subprocess.Popen[str]:
    """Start a server without the OpenTelemetry libraries."""
    command = [sys.executable, "-c", WITHOUT_OTEL, "--listen", "127.0.0.1:0", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment())


def test_server_runs_without_opentelemetry(tmp_path: Path) -> None:
    """The server works without the libraries, because they are an extra."""
    with without_otel("--data-directory", str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("SERVING on ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_endpoint_without_opentelemetry_names_the_extra(tmp_path: Path) -> None:
    """An endpoint without the libraries is rejected before the weights load, with the command that installs them."""
    flags = ("--data-directory", str(tmp_path), "--otlp-endpoint", "http://localhost:4317")
    with without_otel(*flags) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        error == "llama2-server: --otlp-endpoint: traces need the otel extra; run pip install '.[otel]' in the clone\n"
    )


@pytest.mark.parametrize("endpoint", ["localhost:4317", "ftp://here", "http://"])
def test_invalid_endpoint_is_rejected(endpoint: str) -> None:
    """An endpoint without scheme or host is rejected with a valid example."""
    with pytest.raises(
        TelemetryError, match=f"^--otlp-endpoint: {endpoint} is not a valid endpoint; use http://HOST:PORT"
    ):
        check_endpoint(endpoint)
