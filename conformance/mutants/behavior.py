"""A call through the proxy, and the registry of the wrong behaviors.

Each mutant is one function with a hook's decorator; its docstring is the wrong behavior. `on_call` changes the request
or rejects it, `on_reply` changes each message, `on_error` the error, `on_http` an HTTP exchange.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self, TypeAlias

from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from conformance.server_runner.target import Keys

Trailers: TypeAlias = list[tuple[str, str | bytes]]


class Failure(Exception):
    """The end of a call with an error; the hooks of errors change it."""

    def __init__(self, code: str, message: str, trailers: Trailers = []) -> None:  # noqa: B006 - never changed
        super().__init__(message)
        self.code, self.message = code, message
        self.trailers = [pair for pair in trailers if pair[0] in {"grpc-status-details-bin", "grpc-retry-pushback-ms"}]

    @property
    def status(self) -> status_pb2.Status:
        """The details; without them, an empty status."""
        found = [value for key, value in self.trailers if key == "grpc-status-details-bin"]
        return status_pb2.Status.FromString(found[0]) if found and isinstance(found[0], bytes) else status_pb2.Status()

    @status.setter
    def status(self, status: status_pb2.Status) -> None:
        kept = [pair for pair in self.trailers if pair[0] != "grpc-status-details-bin"]
        self.trailers = [*kept, ("grpc-status-details-bin", status.SerializeToString())]

    def drop_details(self, *names: str) -> None:
        """Remove the details of these types; of all types without names."""
        status = self.status
        kept = [detail for detail in status.details if names and detail.type_url.rpartition(".")[2] not in names]
        del status.details[:]
        status.details.extend(kept)
        self.status = status

    def change_detail(self, kind: type[Message], change: Callable[[Any], None]) -> None:
        """Change the details of a type."""
        status = self.status
        for detail in status.details:
            message = kind()
            if detail.Unpack(message):
                change(message)
                detail.Pack(message)
        self.status = status

    @property
    def reason(self) -> str:
        """The reason of ErrorInfo."""
        info = error_details_pb2.ErrorInfo()
        any(detail.Unpack(info) for detail in self.status.details)
        return str(info.reason)


@dataclass(frozen=True, slots=True)
class ProxyKeys:
    """The API keys of the accounts."""

    by_role: dict[str, list[str]]
    roles: dict[str, str]
    """The role of each key."""

    @classmethod
    def of(cls, keys: Keys) -> Self:
        """Return the keys of a run."""
        by_role = {role: [key] for role, key in keys.roles.items()} | {
            role: list(found) for role, found in keys.single.items()
        }
        return cls(by_role, {key: role for role, found in by_role.items() for key in found})


@dataclass(slots=True)
class Call:
    """A call on its way through the proxy."""

    path: str
    data: bytes
    request: Any
    """The request; None if it is not a valid message of a known method."""
    metadata: list[tuple[str, str | bytes]]
    timeout: float | None
    keys: "ProxyKeys"
    state: dict[str, Any]
    """Values that the calls of one run of one case share."""
    send: Callable[["Call"], AsyncIterator[Any]]
    """Makes the call on the correct server."""
    drain_when_cancelled: bool = False
    memory: dict[str, Any] = field(default_factory=dict)
    """Values of a reply hook about this call."""

    @property
    def method(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def role(self) -> str:
        """The role of the API key; `unknown` without a role."""
        found = [str(value).removeprefix("Bearer ") for key, value in self.metadata if key == "authorization"]
        return self.keys.roles.get(found[0], "unknown") if found else "none"

    def use_key(self, role: str) -> None:
        """Replace the API key by one of the role."""
        kept = [pair for pair in self.metadata if pair[0] != "authorization"]
        key = random.choice(self.keys.by_role[role])
        self.metadata = [*kept, ("authorization", f"Bearer {key}")]

    def share_key(self) -> None:
        """Replace the API key by the first one that a call of this behavior had."""
        own = next(pair for pair in self.metadata if pair[0] == "authorization")
        shared = self.state.setdefault("key", own)
        self.metadata = [*(pair for pair in self.metadata if pair[0] != "authorization"), shared]

    async def send_another(self, request: Message, method: str = "Generate") -> list[Any]:
        """Make another call of the same client on the correct server, and return its messages."""
        path = f"/llama2.v1.{'AccountService' if method == 'GetUsage' else 'TextGenerationService'}/{method}"
        another = Call(path, b"", request, self.metadata, self.timeout, self.keys, {}, self.send)
        return [message async for message in self.send(another)]

    @property
    def texts(self) -> list[str]:
        """The prompt and the contents of the messages."""
        return [self.request.prompt, *(message.content for message in self.request.messages)]

    def change_texts(self, change: Callable[[str], str]) -> None:
        """Change the prompt and each content that is set."""
        for holder, name in [(self.request, "prompt"), *((message, "content") for message in self.request.messages)]:
            if holder.HasField(name):
                setattr(holder, name, change(getattr(holder, name)))


def reject(
    field_name: str,
    description: str = "is not allowed",
    code: str = "INVALID_ARGUMENT",
    reason: str = "INVALID_REQUEST",
) -> NoReturn:
    """End the call with an error of the contract's form."""
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=f"{field_name}: {description}")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="llama2.v1"))
    violation = error_details_pb2.BadRequest.FieldViolation(field=field_name, description=description)
    status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id="0" * 32))
    failure = Failure(code, status.message)
    failure.status = status
    raise failure


@dataclass(slots=True)
class Exchange:
    """An HTTP request and its response; the response is empty in the request's hook."""

    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int = 0
    response_headers: dict[str, str] = field(default_factory=dict)
    response_body: str = ""


CallHook: TypeAlias = Callable[[Call], Awaitable[None] | None]
ReplyHook: TypeAlias = Callable[[Call, Any], list[Any] | None]
ErrorHook: TypeAlias = Callable[[Call, Failure], None]
HttpHook: TypeAlias = Callable[[Exchange], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong behavior. Only one of its hooks is set."""

    name: str
    behavior: str
    methods: frozenset[str]
    """The methods that it changes; all without one."""
    call: CallHook | None = None
    data: CallHook | None = None
    """As `call`, also for messages that are not parsed."""
    reply: ReplyHook | None = None
    error: ErrorHook | None = None
    http_request: HttpHook | None = None
    http_response: HttpHook | None = None
    server_options: tuple[tuple[str, int], ...] = ()

    def applies(self, method: str) -> bool:
        """Whether it changes calls of a method."""
        return not self.methods or method in self.methods


MUTANTS: dict[str, Mutant] = {}
GENERATION = "Generate GenerateStream"
TEXT = "Generate GenerateStream CountTokens"


def _register(kind: str, methods: str, function: Any) -> Any:
    name = function.__name__
    if name in MUTANTS:
        raise ValueError(f"mutants: two have the name {name}; rename one")
    hook: dict[str, Any] = {kind: function}
    MUTANTS[name] = Mutant(name, (function.__doc__ or "").strip(), frozenset(methods.split()), **hook)
    return function


def on_call(methods: str = TEXT) -> Callable[[CallHook], CallHook]:
    """Register a mutant that changes or rejects requests of these methods."""
    return lambda function: _register("call", methods, function)


def on_data(methods: str = TEXT) -> Callable[[CallHook], CallHook]:
    """Register a mutant that changes the bytes of requests."""
    return lambda function: _register("data", methods, function)


def on_reply(methods: str = GENERATION) -> Callable[[ReplyHook], ReplyHook]:
    """Register a mutant that changes each message, or returns other messages instead of it."""
    return lambda function: _register("reply", methods, function)


def on_error(methods: str = "") -> Callable[[ErrorHook], ErrorHook]:
    """Register a mutant that changes errors of these methods; of all methods by default."""
    return lambda function: _register("error", methods, function)


def on_http(function: HttpHook) -> HttpHook:
    """Register a mutant that changes HTTP requests."""
    registered: HttpHook = _register("http_request", "", function)
    return registered


def on_http_response(function: HttpHook) -> HttpHook:
    """Register a mutant that changes HTTP responses."""
    registered: HttpHook = _register("http_response", "", function)
    return registered
