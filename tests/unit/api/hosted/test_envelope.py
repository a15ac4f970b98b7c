"""The envelope and the events of the hosted endpoint."""

import json
import re
from pathlib import Path

import pytest
from tests.support.repository import ROOT
from tools.api_reference import ARGUMENTS

from llama2_server.api.hosted import envelope
from llama2_server.engine.sequence import FinishReason
from llama2_server.errors import InvalidRequest, ServiceError, UnknownModel, Violation
from llama2_server.generation.reply import ReplyStats
from llama2_server.usage.pricing import TokenUsage

PAGE = ROOT / "docs/hosted-endpoint.md"
HOST_CODE = 1000  # the lowest code that is the host's


def errors(base: type[ServiceError]) -> list[type[ServiceError]]:
    """Return every error class that has its own reason."""
    own = [base] if "reason" in vars(base) else []
    return own + [error for child in base.__subclasses__() for error in errors(child)]


@pytest.mark.parametrize("kind", errors(ServiceError), ids=lambda kind: kind.__name__)
def test_each_error_has_a_row_in_the_docs(kind: type[ServiceError]) -> None:
    """The table of docs/hosted-endpoint.md has the status and the code of each reason, and marks the host's codes."""
    status, code = envelope.http_error(kind(*ARGUMENTS.get(kind, ())))
    (row,) = [row for row in rows(PAGE) if f"`{kind.reason}`" in row[3]]
    assert row[:3] == [str(status), str(code), "host" if code >= HOST_CODE else "this service"]


def rows(page: Path) -> list[list[str]]:
    """Return the cells of the page's table of errors."""
    found = re.findall(r"(?m)^\| (\d+) \| (\d+) \| (.+?) \| (.*) \|$", page.read_text(encoding="utf-8"))
    return [list(row) for row in found]


def test_results_and_events() -> None:
    """A result and an event are one ASCII line of JSON each, also for characters at which some clients split lines."""
    text = "é\u2028\x85\n"
    stats = ReplyStats(FinishReason.MAX_TOKENS, TokenUsage(8, 6), text, 1, False, 0, 0, 0)
    usage = {"prompt_tokens": 8, "completion_tokens": 6, "total_tokens": 14}
    body = envelope.result_body(text, stats)
    assert json.loads(body) == {
        "result": {"response": text, "usage": usage},
        "success": True,
        "errors": [],
        "messages": [],
    }
    event = envelope.event({"response": text})
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {"response": text}
    for data in (body, event[:-2]):
        assert data.isascii()
        assert len(data.decode().splitlines()) == 1


def test_errors_have_an_entry_per_violation() -> None:
    """Each violation is one entry of `errors`; another error is one entry with its message."""
    error = InvalidRequest([Violation("prompt", "is required"), Violation("", "no")])
    assert envelope.error_object(error) == {
        "result": None,
        "success": False,
        "errors": [{"code": 3003, "message": "prompt: is required"}, {"code": 3003, "message": "no"}],
        "messages": [],
    }
    assert envelope.error_object(UnknownModel("@cf/a"))["errors"][0]["code"] == 5007


@pytest.mark.parametrize("length", [1, 60, 250])
def test_trailers_stay_small(length: int) -> None:
    """All trailers of an error with thousands of violations stay under 4 KB, and the last entry counts the rest."""
    error = InvalidRequest([Violation(f"messages[{index}].content", "x" * length) for index in range(3000)])
    message, trailers = error.to_status("0" * 32)
    sent = [*trailers, *envelope.error_trailers(error), ("grpc-message", message)]
    size = sum(len(key) + len(value) * (4 / 3 if key.endswith("-bin") else 1) for key, value in sent)
    assert size < 4096
    *listed, last = envelope.error_object(error)["errors"]
    assert last["message"] == f"{3000 - len(listed)} more violations are not listed"
