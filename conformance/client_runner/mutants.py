"""Clients with one wrong behavior each, which the cases must find."""

# ruff: noqa: D102 - a mutant's class docstring is its behavior; its methods override ReferenceClient's

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.rpc import status_pb2

from conformance.client_runner.cases import load_client_cases
from conformance.client_runner.reference import RETRY_POLICY, ReferenceClient
from conformance.client_runner.run import run_client_cases
from llama2.v1 import text_generation_pb2 as pb


class NoRetries(ReferenceClient):
    """Never retries."""

    def options(self) -> list[tuple[str, int]]:
        return [("grpc.enable_retries", 0)]


class RetriesExhausted(ReferenceClient):
    """Retries RESOURCE_EXHAUSTED."""

    def retry_policy(self) -> dict[str, Any]:
        return RETRY_POLICY | {"retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]}


class IgnoresPushback(ReferenceClient):
    """Retries in spite of pushback -1."""

    async def finish(self, command: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        again = answer["code"] == "UNAVAILABLE" and not answer["text"] and "again" not in command
        return await self.ask(command | {"again": True}) if again else answer


class RetriesStarted(ReferenceClient):
    """Retries a reply that has started."""

    async def finish(self, command: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        again = answer["code"] == "UNAVAILABLE" and answer["text"] and "again" not in command
        return await self.ask(command | {"again": True}) if again else answer


class RetriesEverything(ReferenceClient):
    """Retries every error once."""

    async def finish(self, command: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        again = answer["code"] not in {"OK", "UNAVAILABLE"} and "again" not in command
        return await self.ask(command | {"again": True}) if again else answer


class SeedAsDouble(ReferenceClient):
    """Returns the seed as a floating-point number."""

    def seed(self, seed: int) -> str:
        return f"{float(seed):.0f}"


class SendsSeedAsDouble(ReferenceClient):
    """Sends the seed as a floating-point number."""

    def request(self, document: dict[str, Any]) -> pb.GenerateRequest:
        request = super().request(document)
        if request.HasField("seed"):
            request.seed = min(int(float(request.seed)), 2**64 - 2048)
        return request


class OmitsZero(ReferenceClient):
    """Omits zero, false and empty text."""

    def request(self, document: dict[str, Any]) -> pb.GenerateRequest:
        return super().request({key: value for key, value in document.items() if value not in (0, "0", "", False)})


class SendsDefaults(ReferenceClient):
    """Sends a value for top_p that the caller has not set."""

    def request(self, document: dict[str, Any]) -> pb.GenerateRequest:
        return super().request({"top_p": 0.9, **document})


class PriceAsDouble(ReferenceClient):
    """Returns the price as a floating-point number."""

    def neurons(self, neurons: str) -> str:
        return str(float(neurons))


class FinishReasonAsNumber(ReferenceClient):
    """Returns the number of the finish reason."""

    def finish_reason(self, number: int) -> str:
        return str(number)


class RejectsUnknownEnum(ReferenceClient):
    """Fails at an unknown finish reason."""

    def finish_reason(self, number: int) -> str:
        return pb.FinishReason.Name(number)  # any number may arrive


class RejectsUnknownFields(ReferenceClient):
    """Fails at an unknown field."""

    def parse(self, data: bytes) -> pb.GenerateStreamResponse:
        message = super().parse(data)
        message.DiscardUnknownFields()
        if message.ByteSize() != len(data) and not message.HasField("completion"):
            raise ValueError("unknown field")
        return message


class EndsAtEmptyDelta(ReferenceClient):
    """Ends at a message without text."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        async for message in call:
            if message.response or message.HasField("completion"):
                yield message
            else:
                yield pb.GenerateStreamResponse(completion=pb.Completion(finish_reason=pb.FINISH_REASON_MAX_TOKENS))
                return


class EndsAtCompletion(ReferenceClient):
    """Does not read the end of the call."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        async for message in call:
            yield message
            if message.HasField("completion"):
                return


class IgnoresTextOfLast(ReferenceClient):
    """Ignores the text of the message with the completion."""

    def text(self, message: pb.GenerateStreamResponse) -> str:
        return "" if message.HasField("completion") else message.response


class LimitsMessages(ReferenceClient):
    """Reads at most 1,000 messages."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        count = 0
        async for message in call:
            count += 1
            if count <= 1000 or message.HasField("completion"):
                yield message


class SmallMessages(ReferenceClient):
    """Receives only small messages."""

    def options(self) -> list[tuple[str, int]]:
        return [("grpc.max_receive_message_length", 100_000)]


class AsciiOnly(ReferenceClient):
    """Replaces characters that are not ASCII."""

    def text(self, message: pb.GenerateStreamResponse) -> str:
        return message.response.encode("ascii", "replace").decode()


class AcceptsMissingCompletion(ReferenceClient):
    """Takes a stream without a completion for a whole reply."""

    def success(self, text: str, completion: pb.Completion | None) -> dict[str, Any]:
        return super().success(text, completion or pb.Completion())


class AcceptsCutStream(ReferenceClient):
    """Takes a cut stream for a whole reply."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        cut = text and not answer["reason"] and answer["code"] not in {"DEADLINE_EXCEEDED"}
        return self.success(text, pb.Completion()) if cut else answer


class DropsPartialText(ReferenceClient):
    """Loses the text so far at an error."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        return super().failure(error, "")


class EndsWhenIdle(ReferenceClient):
    """Ends when no message arrives for 300 milliseconds."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        messages = aiter(call)
        while True:
            try:
                async with asyncio.timeout(0.3):
                    message = await anext(messages)
            except (StopAsyncIteration, TimeoutError):
                return
            yield message

    def success(self, text: str, completion: pb.Completion | None) -> dict[str, Any]:
        answer = super().success(text, completion)
        return answer | {"code": "ABORTED"} if text == "Hello" else answer


class ClosesAtGoaway(ReferenceClient):
    """Ends the running call when its connection takes no further calls."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        messages = aiter(call)
        yield await anext(messages)
        changed = asyncio.ensure_future(self.channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        try:
            while True:
                message = asyncio.ensure_future(anext(messages, None))
                done, _ = await asyncio.wait({message, changed}, return_when=asyncio.FIRST_COMPLETED)
                if message not in done:
                    message.cancel()
                    return
                received = message.result()
                if received is None:
                    return
                yield received
        finally:
            changed.cancel()


class TrustsDetails(ReferenceClient):
    """Fails at details that cannot be read."""

    def status(self, error: grpc.aio.AioRpcError) -> status_pb2.Status:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        return status_pb2.Status.FromString(details if isinstance(details, bytes) else b"")


class NeedsDetails(ReferenceClient):
    """Takes an error without details for an internal one."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer if answer["reason"] or answer["text"] else answer | {"code": "INTERNAL"}


class FirstDetailOnly(ReferenceClient):
    """Reads only the first detail."""

    def status(self, error: grpc.aio.AioRpcError) -> status_pb2.Status:
        status = super().status(error)
        del status.details[1:]
        return status


class FirstViolationOnly(ReferenceClient):
    """Returns only the first violation."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer | {"fields": answer["fields"][:1]}


class KnownReasonsOnly(ReferenceClient):
    """Drops unknown reasons."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer | {"reason": answer["reason"].replace("SOMETHING_NEW", "")}


class IgnoresRetryInfo(ReferenceClient):
    """Does not return the delay of RetryInfo."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        return super().failure(error, text) | {"retry_after_ms": None}


class Latin1Messages(ReferenceClient):
    """Reads the status message as Latin-1."""

    def message(self, message: str) -> str:
        return message.encode().decode("latin-1")


class UnknownCodeIsInternal(ReferenceClient):
    """Takes an unknown status code for INTERNAL."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer | {"code": "INTERNAL"} if answer["code"] == "UNKNOWN" else answer


class LocalDeadline(ReferenceClient):
    """Sends no deadline to the server."""

    def timeout(self, command: dict[str, Any]) -> float | None:
        return None

    async def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(super().timeout(command)):
                return await super().ask(command)
        except TimeoutError:
            return {"code": "DEADLINE_EXCEEDED", "text": "Hello"}


class LocalCancel(ReferenceClient):
    """Stops reading, and leaves the call running."""

    def cancel(self, call: Any) -> None:
        self.kept = call


class ClosesAfterError(ReferenceClient):
    """Makes no call after an error."""

    async def finish(self, command: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        if answer["code"] == "INVALID_ARGUMENT":
            await self.channel.close()
        return answer


class KeyWithoutScheme(ReferenceClient):
    """Sends the API key without its scheme."""

    def metadata(self, key: str | None) -> list[tuple[str, str]]:
        return [] if key is None else [("authorization", key)]


class EmptyKey(ReferenceClient):
    """Sends authorization without a key."""

    def metadata(self, key: str | None) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {key or 'none'}")]


@asynccontextmanager
async def _running(kind: type[ReferenceClient], address: str) -> AsyncIterator[ReferenceClient]:
    client = kind(address)
    try:
        yield client
    finally:
        await client.channel.close()


async def failed_client_cases(name: str, cases: Collection[str]) -> list[str]:
    """Run the named cases against a mutant, or against the correct client without a name; return the failed ones."""
    kind = client_mutants()[name] if name else ReferenceClient
    selected = [case for case in load_client_cases() if case.name in cases]
    results = await run_client_cases(lambda address: _running(kind, address), selected)
    return [result.case.name.removeprefix("client/") for result in results if not result.ok]


def client_mutants() -> dict[str, type[ReferenceClient]]:
    """Return the mutants by name."""
    return {mutant.__name__: mutant for mutant in ReferenceClient.__subclasses__()}
