"""Logging: the standard library's records, formatted by structlog for a terminal or as JSON.

The message of an exception is never logged, because it may quote a prompt or a key. The log has its type and its
stack instead. Debug records of libraries are never logged, for the same reason.
"""

import asyncio
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from llama2_server.telemetry.call import CALL

PACKAGE_LOGGER = "llama2_server"
MAX_FRAMES = 50  # innermost frames of each exception

logger = logging.getLogger(__name__)

_EXTRA_ADDER = structlog.stdlib.ExtraAdder()


def configure(level: str, log_format: Literal["auto", "console", "json"], stream: TextIO | None = None) -> None:
    """Write log records, Python's warnings and uncaught exceptions of threads to one stream, by default stderr."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    console = log_format == "console" or (log_format == "auto" and stream.isatty())
    handler.setFormatter(_formatter(console=console, colors=stream.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(threshold, logging.INFO))
    logging.getLogger(PACKAGE_LOGGER).setLevel(threshold)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs each of its plugins at every start
    for library in ("httpx", "httpx2"):  # the Hub library's transport logs each request
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # its debug mode logs the arguments of slow callbacks
    logging.captureWarnings(True)
    threading.excepthook = _on_thread_exception
    sys.unraisablehook = _on_unraisable


def on_loop_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an event loop's exception; asyncio's own handler logs messages and arguments of callbacks."""
    message = "a callback failed" if "handle" in context else context["message"]
    logger.error(message, exc_info=context.get("exception"))


def format_exception(error: BaseException) -> str:
    """Format the exceptions of a chain by type, file, line and function, without their messages."""
    return "\n".join(_lines(error, set(), ""))


def _lines(error: BaseException, seen: set[int], indent: str) -> Iterator[str]:
    seen.add(id(error))
    previous = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if previous is not None and id(previous) not in seen:
        yield from _lines(previous, seen, indent)
        yield f"{indent}which led to"
    kind = type(error)
    yield indent + (kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}")
    for frame, line in deque(traceback.walk_tb(error.__traceback__), maxlen=MAX_FRAMES):
        yield f"{indent}  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _lines(inner, seen, indent + "  | ")


class _Formatter(logging.Formatter):
    """Formats the standard library's records with structlog's processors.

    structlog's own ProcessorFormatter copies each record, which is a tenth of the cost of a rejected call.
    """

    def __init__(
        self, processors: Sequence[Processor], renderer: Callable[[WrappedLogger, str, EventDict], str | bytes]
    ) -> None:
        super().__init__()
        self._processors = processors
        self._renderer = renderer

    def format(self, record: logging.LogRecord) -> str:
        event: EventDict = {"event": record.getMessage(), "_record": record}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        if record.stack_info:
            event["stack_info"] = record.stack_info
        level = record.levelname.lower()
        for process in self._processors:
            process(None, level, event)
        del event["_record"]
        return str(self._renderer(None, level, event))


def _formatter(*, console: bool, colors: bool) -> logging.Formatter:
    processors: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _add_extra,
        _add_call,
        _add_exception,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
    ]
    if console:
        return _Formatter(processors, structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0))
    return _Formatter(processors, structlog.processors.JSONRenderer())


def _add_extra(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the `extra` of this package's records only; `extra` of libraries may contain request text."""
    if event["_record"].name.startswith(PACKAGE_LOGGER):
        _EXTRA_ADDER(_, __, event)
    return event


def _add_call(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the ids of the current call."""
    call = CALL.get(None)
    if call is not None:
        event.setdefault("request_id", call.request_id)
        if call.trace_id is not None:
            event.update(trace_id=call.trace_id, span_id=call.span_id)
    return event


def _add_exception(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    exception = event.pop("exc_info", None)
    error = exception[1] if isinstance(exception, tuple) else exception
    if isinstance(error, BaseException):
        event["exception"] = format_exception(error)
    return event


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "?"
    logger.error("thread %s failed with an exception", name, exc_info=_exc_info(args.exc_value))


def _on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    logger.error("an exception was ignored", exc_info=_exc_info(unraisable.exc_value))


def _exc_info(
    error: BaseException | None,
) -> tuple[type[BaseException], BaseException, TracebackType | None] | None:
    return None if error is None else (type(error), error, error.__traceback__)
