"""The async Python client of llama2-grpc.

```python
from llama2_client import Client

async with Client("localhost:50051") as client:
    async with client.stream("Tell me a story about a fox.") as stream:
        async for delta in stream:
            print(delta, end="", flush=True)
```
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama2_client.chat import Chat
    from llama2_client.client import Client, HealthStatus, TokenCount
    from llama2_client.errors import (
        DeadlineExceeded,
        InternalError,
        InvalidRequest,
        Llama2Error,
        PermissionDenied,
        QueueFull,
        QuotaExceeded,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        Violation,
    )
    from llama2_client.reply import FinishReason, Message, Reply, ReplyStream
    from llama2_client.request import GenerationOptions

__all__ = [
    "Chat",
    "Client",
    "DeadlineExceeded",
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
    "TokenCount",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Violation",
]


def __getattr__(name: str) -> object:
    # Load the modules on first use, because `llama2 --help` does not need gRPC and importing gRPC is slow.
    if name in __all__:
        for module in ("client", "chat", "errors", "reply", "request"):
            value = getattr(import_module(f".{module}", __name__), name, None)
            if value is not None:
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
