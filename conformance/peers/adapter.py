"""A gRPC server with the two methods of the text cases, on top of another program."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from llama2.v1 import text_generation_pb2 as pb

SERVICE = "llama2.v1.TextGenerationService"
DEFAULT_MAX_TOKENS = 256
TEMPERATURE = 0.6
TOP_P = 0.9


@dataclass(frozen=True, slots=True)
class PeerReply:
    """A reply of another program; `finish_reason` is the end of the name in FinishReason."""

    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int


class Peer(Protocol):
    """Another program that generates text."""

    def complete(self, prompt: str, max_tokens: int) -> PeerReply:
        """Continue a raw prompt."""

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> PeerReply:
        """Reply to a conversation."""


class PeerServicer:
    """Translates calls. It adds no rule of the contract, so that the program's own behavior is visible."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Generate a reply."""
        reply = await asyncio.to_thread(self._reply, request)
        return pb.GenerateResponse(response=reply.text, completion=_completion(reply))

    async def generate_stream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Generate a reply, in one message."""
        reply = await asyncio.to_thread(self._reply, request)
        yield pb.GenerateStreamResponse(response=reply.text, completion=_completion(reply))

    def handlers(self) -> dict[str, Any]:
        """Return the methods; every other one is UNIMPLEMENTED."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        read = pb.GenerateRequest.FromString
        return {
            "Generate": unary(self.generate, read, pb.GenerateResponse.SerializeToString),
            "GenerateStream": stream(self.generate_stream, read, pb.GenerateStreamResponse.SerializeToString),
        }

    def _reply(self, request: pb.GenerateRequest) -> PeerReply:
        max_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
        if request.raw:
            return self._peer.complete(request.prompt, max_tokens)
        messages = [{"role": one.role, "content": one.content} for one in request.messages]
        return self._peer.chat(messages or [{"role": "user", "content": request.prompt}], max_tokens)


def _completion(reply: PeerReply) -> pb.Completion:
    return pb.Completion(
        finish_reason=f"FINISH_REASON_{reply.finish_reason}",
        usage=pb.Usage(input_tokens=reply.input_tokens, output_tokens=reply.output_tokens),
    )


@asynccontextmanager
async def running_adapter(peer: Peer) -> AsyncIterator[str]:
    """Serve a peer on a free loopback port, and yield the address."""
    server = grpc.aio.server()
    handlers = PeerServicer(peer).handlers()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
