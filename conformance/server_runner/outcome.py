"""The result of one call in one form, for gRPC and HTTP."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from llama2.v1 import text_generation_pb2

DETAILS: Mapping[str, type[Message]] = {
    name: getattr(error_details_pb2, name)
    for name in ("ErrorInfo", "BadRequest", "QuotaFailure", "RetryInfo", "RequestInfo")
}


@dataclass(slots=True)
class Outcome:
    """The status, the messages and the details of one call."""

    code: str = "OK"
    """The name of the gRPC code; for HTTP, of the code in the body."""
    message: str = ""
    status: status_pb2.Status = field(default_factory=status_pb2.Status)
    trailers: list[tuple[str, str | bytes]] = field(default_factory=list)
    messages: list[Any] = field(default_factory=list)
    """Protobuf messages, or the objects of an HTTP body."""
    first_message_ms: float = 0
    deadline_ms: int = 0
    request: Message | None = None
    """The request; None for a raw call and for HTTP."""
    http_status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def deltas(self) -> list[str]:
        """The `response` of each message."""
        if self.http_status:
            return [str(message.get("response", "")) for message in self.messages]
        return [getattr(message, "response", "") for message in self.messages]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.deltas)

    @property
    def completions(self) -> list[text_generation_pb2.Completion | None]:
        """The completion of each message of a gRPC reply."""
        found = []
        for message in self.messages:
            has_one = "completion" in message.DESCRIPTOR.fields_by_name and message.HasField("completion")
            found.append(message.completion if has_one else None)
        return found

    @property
    def completion(self) -> text_generation_pb2.Completion:
        """The completion of the last message; an empty one if it has none."""
        last = self.completions[-1] if self.messages and not self.http_status else None
        return last or text_generation_pb2.Completion()

    @property
    def last(self) -> Any:
        """The last message in protobuf's JSON form."""
        if not self.messages:
            return {}
        if self.http_status:
            return self.messages[-1]
        return MessageToDict(
            self.messages[-1], preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    def details(self) -> Iterator[tuple[str, Message]]:
        """Yield the short type name and the message of each detail; unknown types have an empty message."""
        for detail in self.status.details:
            name = detail.type_url.rpartition(".")[2]
            message = DETAILS.get(name, error_details_pb2.Help)()
            detail.Unpack(message)
            yield name, message

    def detail(self, name: str) -> Any:
        """Return the detail of a type; an empty message without it."""
        return next((message for found, message in self.details() if found == name), DETAILS[name]())


def events(text: str) -> list[Any]:
    """Return the JSON objects of an event stream.

    Raises:
        ValueError: the text is not an event stream of JSON objects.
    """
    blocks = [block for block in text.split("\n\n") if block]
    if not all(block.startswith("data: ") and "\n" not in block for block in blocks):
        raise ValueError("not an event stream with one `data: ` line per event")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]
