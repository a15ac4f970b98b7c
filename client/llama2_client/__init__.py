"""The Python client of llama2-grpc: `Client` is async, and `SyncClient` is its synchronous twin.

```python
from llama2_client import Client, SyncClient

async with Client("localhost:50051") as client:
    async with client.stream("Tell me a story about a fox.") as stream:
        async for delta in stream:
            print(delta, end="", flush=True)

with SyncClient("localhost:50051") as client:
    print(client.generate("Tell me a story about a fox.").text)
```
"""

# Only what is necessary, because the command `llama2` handles signals after this import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from llama2_client.aio.chat import Chat
    from llama2_client.aio.client import Client
    from llama2_client.aio.reply_stream import ReplyStream
    from llama2_client.errors import (
        BudgetExhausted,
        ConnectionProblem,
        DeadlineExceeded,
        FailedPrecondition,
        InternalError,
        InvalidRequest,
        Llama2Error,
        PermissionDenied,
        QueueFull,
        QuotaExceeded,
        ResourceExhausted,
        TooManyRequests,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        Violation,
    )
    from llama2_client.reply import FinishReason, HealthStatus, Message, Reply, TokenCount
    from llama2_client.request import GenerationOptions
    from llama2_client.sync.chat import SyncChat
    from llama2_client.sync.client import SyncClient
    from llama2_client.sync.reply_stream import SyncReplyStream

__all__ = [
    "BudgetExhausted",
    "Chat",
    "Client",
    "ConnectionProblem",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FinishReason",
    "GenerationOptions",
    "HealthStatus",
    "InternalError",
    "InvalidRequest",
    "Llama2Error",
    "Message",
    "PermissionDenied",
    "QueueFull",
    "QuotaExceeded",
    "Reply",
    "ReplyStream",
    "ResourceExhausted",
    "SyncChat",
    "SyncClient",
    "SyncReplyStream",
    "TokenCount",
    "TooManyRequests",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Violation",
]

_MODULES = {
    "Client": "aio.client",
    "Chat": "aio.chat",
    "ReplyStream": "aio.reply_stream",
    "SyncClient": "sync.client",
    "SyncChat": "sync.chat",
    "SyncReplyStream": "sync.reply_stream",
    "GenerationOptions": "request",
    **dict.fromkeys(("FinishReason", "HealthStatus", "Message", "Reply", "TokenCount"), "reply"),
}


def __getattr__(name: str) -> object:
    # Load the modules on first use, because `llama2 --help` does not need gRPC and importing gRPC is slow.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
