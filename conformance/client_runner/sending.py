"""Clients that send wrongly; each has one wrong behavior."""

# ruff: noqa: D102 - a class docstring is the behavior; the methods override those of ReferenceClient

import asyncio
from typing import Any

from conformance.client_runner.reference import RETRY_POLICY, ReferenceClient
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


class SmallMessages(ReferenceClient):
    """Receives only small messages."""

    def options(self) -> list[tuple[str, int]]:
        return [("grpc.max_receive_message_length", 100_000)]


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
