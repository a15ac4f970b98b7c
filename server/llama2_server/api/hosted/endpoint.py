"""HostedEndpointService: the same replies as TextGenerationService, in the host's format."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from llama2.hosted.v1 import hosted_endpoint_pb2 as pb
from llama2.hosted.v1 import hosted_endpoint_pb2_grpc
from llama2_server.admission.accounts import ANONYMOUS, Authenticator
from llama2_server.api.hosted.body import BodyParser
from llama2_server.api.hosted.envelope import (
    DONE,
    EVENTS_TYPE,
    JSON_TYPE,
    error_object,
    event,
    result_body,
    usage_object,
)
from llama2_server.api.text_generation import TextGenerationServicer
from llama2_server.card import ModelCard
from llama2_server.errors import DeadlineExceeded, InternalError, ServiceError, Unauthenticated, UnknownModel
from llama2_server.generation.reply import Reply
from llama2_server.telemetry.call import CALL

LAST_EVENT_SECONDS = 0.1
"""How long before a deadline a stream ends, so that its last event arrives."""


class HostedEndpointServicer(hosted_endpoint_pb2_grpc.HostedEndpointServiceServicer):
    """Reads the host's JSON and writes its envelope or events; `text_generation` makes the replies."""

    def __init__(self, card: ModelCard, authenticator: Authenticator, text_generation: TextGenerationServicer) -> None:
        self._model = card.name
        self._parser = BodyParser(card)
        self._authenticator = authenticator
        self._text_generation = text_generation

    async def Run(self, request: pb.RunRequest, context: Any) -> HttpBody:
        """Return the whole reply in the envelope."""
        async with self._serve(request, context, streaming=False) as reply:
            text = "".join([delta async for delta in reply.deltas()])
            return HttpBody(content_type=JSON_TYPE, data=result_body(text, reply.stats()))

    async def RunStream(self, request: pb.RunRequest, context: Any) -> None:  # type: ignore[override]  # as GenerateStream
        """Send the reply as events while it is generated. An error after the first event is the last event."""
        async with self._serve(request, context, streaming=True) as reply:
            started = False
            try:
                async with _before_deadline(context):
                    async for delta in reply.deltas():
                        await _send(context, event({"response": delta}))
                        started = True
                last = event({"response": "", "usage": usage_object(reply.stats())})
                await _send(context, last + DONE)
            except Exception as error:
                if started:
                    await _send(context, event(error_object(_public(error))))
                raise

    @asynccontextmanager
    async def _serve(self, request: pb.RunRequest, context: Any, *, streaming: bool) -> AsyncIterator[Reply]:
        """Check the path and the body, and yield the reply."""
        account = self._authenticator.authenticate(context.invocation_metadata())
        CALL.get().account_id = account.id
        if account is not ANONYMOUS and request.account_id != account.id:
            raise Unauthenticated("the account in the URL is not the account of the API key; use the key's account")
        if request.model != self._model:
            raise UnknownModel(self._model)
        body = self._parser.parse(request.body.data)
        async with self._text_generation.serve(body, context, streaming=streaming) as reply:
            yield reply


@asynccontextmanager
async def _before_deadline(context: Any) -> AsyncIterator[None]:
    """End the body shortly before the call's deadline, after which gRPC sends nothing of the server.

    Raises:
        DeadlineExceeded: the body takes too long.
    """
    seconds = context.time_remaining()
    try:
        async with asyncio.timeout(None if seconds is None else seconds - LAST_EVENT_SECONDS):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the reply was complete") from None


async def _send(context: Any, data: bytes) -> None:
    await context.write(HttpBody(content_type=EVENTS_TYPE, data=data))


def _public(error: Exception) -> ServiceError:
    """Return the error that the client may see."""
    return error if isinstance(error, ServiceError) else InternalError()
