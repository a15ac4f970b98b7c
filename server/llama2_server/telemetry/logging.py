"""Log lines, for people or for machines: the standard library's records, rendered by structlog.

No exception's message is ever logged, because it may quote what it was thrown at: a prompt, a key. What is logged is
its type and the places in the code that it came through. Libraries' debug lines are left out at every level for the
same reason.
"""

import asyncio
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from llama2_server.telemetry.call import CALL

OURS = "llama2_server"
MAX_FRAMES = 50  # the innermost ones of each exception

logger = logging.getLogger(__name__)


def configure(level: str, log_format: Literal["auto", "console", "json"], stream: TextIO | None = None) -> None:
    """Send log records, Python's warnings and the exceptions that threads die of to one stream: stderr by default."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    console = log_format == "console" or (log_format == "auto" and stream.isatty())
    handler.setFormatter(_formatter(console=console, colors=stream.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(threshold, logging.INFO))
    logging.getLogger(OURS).setLevel(threshold)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each of its plugins at every start
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # its debug mode warns of slow callbacks, and quotes them
    logging.captureWarnings(True)
    threading.excepthook = _on_thread_exception
    sys.unraisablehook = _on_unraisable


def on_loop_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler; asyncio's own quotes exceptions, and what callbacks were called with."""
    message = "a callback failed" if "handle" in context else context["message"]
    logger.error(message, exc_info=context.get("exception"))


def outline(error: BaseException) -> str:
    """What happened and where, without a word that came with it: types, files, lines and functions."""
    return "\n".join(_lines(error, set(), ""))


def _lines(error: BaseException, told: set[int], indent: str) -> Iterator[str]:
    told.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in told:
        yield from _lines(before, told, indent)
        yield f"{indent}which led to"
    kind = type(error)
    yield indent + (kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}")
    for frame, line in deque(traceback.walk_tb(error.__traceback__), maxlen=MAX_FRAMES):
        yield f"{indent}  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _lines(inner, told, indent + "  | ")


def _formatter(*, console: bool, colors: bool) -> structlog.stdlib.ProcessorFormatter:
    before: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _add_extra,
        _add_call,
        _outline_exception,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
    ]
    renderer: Processor = structlog.processors.JSONRenderer()
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )


def _add_extra(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Take the `extra` of our own records; what libraries put there is anybody's guess."""
    if event["_record"].name.startswith(OURS):
        structlog.stdlib.ExtraAdder()(_, __, event)
    return event


def _add_call(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Say during which call it was logged."""
    call = CALL.get(None)
    if call is not None:
        event.setdefault("request_id", call.request_id)
        if call.trace_id is not None:
            event.update(trace_id=call.trace_id, span_id=call.span_id)
    return event


def _outline_exception(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    exception = event.pop("exc_info", None)
    error = exception[1] if isinstance(exception, tuple) else exception
    if isinstance(error, BaseException):
        event["exception"] = outline(error)
    return event


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "?"
    logger.error("thread %s died", name, exc_info=_exc_info(args.exc_value))


def _on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    logger.error("an exception could not be raised", exc_info=_exc_info(unraisable.exc_value))


def _exc_info(
    error: BaseException | None,
) -> tuple[type[BaseException], BaseException, TracebackType | None] | None:
    return None if error is None else (type(error), error, error.__traceback__)
