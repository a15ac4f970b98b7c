"""Log records: console and JSON formats, one record per request, and no exception messages."""

import asyncio
import io
import json
import logging
import re
import threading
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from tests.integration.telemetry.conftest import Watched
from tests.support.service import ServiceMaker, disconnect, health_stub, hold_slot, until

from llama2.v1 import text_generation_pb2 as pb
from llama2_server import app
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.lifecycle.preflight import StartupInputs
from llama2_server.telemetry import logging as logs

pytestmark = pytest.mark.usefixtures("logging_restored")
REPLY = "Once upon a time, a fox lived by the sea."
GENERATE = "llama2.v1.TextGenerationService/Generate"
logger = logging.getLogger("llama2_server.test")


class Terminal(io.StringIO):
    """A text stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def records_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def requests_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [record for record in records_of(stream) if record["event"] == "request"]


def a_chain() -> Exception:
    """Return an exception group with a cause and a note, each with a secret."""
    try:
        try:
            raise KeyError("secret one")
        except KeyError as error:
            inner = ExceptionGroup("secret two", [ValueError("secret three"), OSError("secret four")])
            inner.add_note("secret five")
            raise inner from error
    except ExceptionGroup as error:
        return error


def test_json_format() -> None:
    """Without a terminal, a record is a JSON object with time, level, logger, event and extra fields."""
    stream = io.StringIO()
    logs.configure("info", "auto", stream)
    logger.warning("the %s is %s", "sea", "blue", extra={"depth": 7})
    (record,) = records_of(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", record.pop("timestamp"))
    assert record == {"event": "the sea is blue", "level": "warning", "logger": "llama2_server.test", "depth": 7}


@pytest.mark.parametrize(("log_format", "stream"), [("auto", Terminal()), ("console", io.StringIO())])
def test_console_format(log_format: Any, stream: io.StringIO) -> None:
    """On a terminal, or if set, a record is a line of text; only terminals get colors."""
    logs.configure("info", log_format, stream)
    logger.info("the sea is blue", extra={"depth": 7})
    text = stream.getvalue()
    assert ("\x1b[" in text) == stream.isatty()
    plain = re.sub(r"\x1b\[\d*m", "", text)
    assert re.match(r"\d\d:\d\d:\d\d \[info +\] the sea is blue +\[llama2_server\.test\] depth=7\n", plain)


def test_level_applies_to_this_package_only() -> None:
    """`debug` shows debug records of this package only, because records of libraries may quote their input."""
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    logger.debug("own")
    logging.getLogger("cachetools").debug("library debug")
    logging.getLogger("cachetools").info("library info", extra={"request": "quoted"})
    assert [record["event"] for record in records_of(stream)] == ["own", "library info"]
    assert "quoted" not in stream.getvalue()
    logs.configure("warning", "json", again := io.StringIO())
    logger.info("own")
    assert again.getvalue() == ""


def test_python_warnings_are_logged() -> None:
    """Python warnings are log records."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("the sea is rising", UserWarning, stacklevel=1)
    (record,) = records_of(stream)
    assert (record["logger"], record["level"]) == ("py.warnings", "warning")
    assert "the sea is rising" in record["event"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_exceptions_are_logged_by_type_and_place(log_format: Any) -> None:
    """An exception is logged with its chain, by types, files, lines and functions, without messages."""
    stream = io.StringIO()
    logs.configure("debug", log_format, stream)
    try:
        raise a_chain()
    except Exception:
        logger.exception("it failed")
    text = stream.getvalue()
    assert "secret" not in text
    for part in ("KeyError", "ExceptionGroup", "  | ValueError", "  | OSError", "which led to", "in a_chain"):
        assert part in text
    assert re.search(r"test_logging\.py:\d+ in a_chain", text)


async def test_uncaught_exceptions_are_logged_by_type_and_place(capfd: pytest.CaptureFixture[str]) -> None:
    """Uncaught exceptions in callbacks, tasks, threads and destructors are logged by type and place too."""
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.on_loop_exception)

    def fail(text: str) -> None:
        raise ValueError(text)

    class Fails:
        def __del__(self) -> None:
            fail("secret")

    async def forgotten() -> None:
        fail("secret")

    loop.call_soon(fail, "secret")
    task = asyncio.create_task(forgotten())
    await asyncio.wait([task])
    del task
    thread = threading.Thread(target=fail, args=("secret",), name="worker")
    thread.start()
    await asyncio.to_thread(thread.join)
    Fails()
    assert [record["event"] for record in records_of(stream)] == [
        "a callback failed",
        "Task exception was never retrieved",
        "thread worker failed with an exception",
        "an exception was ignored",
    ]
    assert all("ValueError" in record["exception"] for record in records_of(stream))
    assert "secret" not in stream.getvalue() + "".join(capfd.readouterr())


async def test_server_takes_the_loops_exceptions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that runs has its event loop's exceptions logged so."""
    handlers: list[object] = []

    @asynccontextmanager
    async def start(*_: object) -> AsyncIterator[str]:
        handlers.append(asyncio.get_running_loop().get_exception_handler())
        raise ConfigurationError
        yield ""

    monkeypatch.setattr(app, "start", start)
    settings = Settings.model_validate({"data_directory": tmp_path})
    with pytest.raises(ConfigurationError):
        await app.serve(settings, cast(StartupInputs, None))
    assert handlers == [logs.on_loop_exception]


async def test_request_is_one_record(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A request's record has its id, account, method, code, tokens, price, times and trace."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        completion = (await service.text.Generate(pb.GenerateRequest(prompt="x"))).completion
        await until(lambda: len(requests_of(stream)) == 1)
        spans = await watched.trace("OK")
    (record,) = requests_of(stream)
    times = {name for name in record if name.endswith("_seconds")}
    assert times == {f"{name}_seconds" for name in ("total", "validation", "queue_time", "prefill", "decode")}
    assert {name: value for name, value in record.items() if name not in times} == {
        "event": "request",
        "level": "info",
        "logger": "llama2_server.requests",
        "timestamp": record["timestamp"],
        "request_id": completion.request_id,
        "method": GENERATE,
        "code": "OK",
        "account_id": "anonymous",
        "finish_reason": "END_OF_SEQUENCE",
        "cached": False,
        "input_tokens": completion.usage.input_tokens,
        "output_tokens": completion.usage.output_tokens,
        "neurons": record["neurons"],
        "trace_id": f"{spans[0].context.trace_id:032x}",
        "span_id": next(f"{span.context.span_id:016x}" for span in spans if span.parent is None),
    }
    assert float(record["neurons"]) == float(completion.usage.neurons)


async def test_rejected_and_cancelled_requests_are_logged(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A rejection's record has its reason; a cancelled request is logged once its usage is known."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="x", top_p=2))
        await disconnect(service, await hold_slot(service))
        assert len(requests_of(stream)) == 1
        service.model.open_gate()
        await until(lambda: len(requests_of(stream)) == 2)
    rejected, cancelled = requests_of(stream)
    assert (rejected["code"], rejected["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert (cancelled["code"], cancelled["output_tokens"]) == ("CANCELLED", 2)
    assert "finish_reason" not in cancelled


async def test_records_of_a_request_share_its_ids(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A record during a request, here of its error, has the request's id and trace."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="x"))
        await until(lambda: len(requests_of(stream)) == 1)
    # The probes after the error fail too.
    engine_record = next(record for record in records_of(stream) if record["event"] == "sequence failed in the engine")
    assert "RuntimeError" in engine_record["exception"]
    assert "scripted_model.py" in engine_record["exception"]
    for name in ("request_id", "trace_id", "span_id"):
        assert engine_record[name] == requests_of(stream)[0][name]


@pytest.mark.parametrize(("level", "records"), [("info", 0), ("debug", 1)])
async def test_probes_are_logged_at_debug_only(serve_scripted: ServiceMaker, level: str, records: int) -> None:
    """Health probes are logged at level debug only, because they arrive every few seconds."""
    stream = io.StringIO()
    logs.configure(level, "json", stream)
    async with serve_scripted(REPLY) as service:
        await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())
    assert len(requests_of(stream)) == records
