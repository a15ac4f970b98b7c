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
    # Importing gRPC takes a while, and `llama2 --help` needs none of it: names are looked up when they are first used.
    if name in __all__:
        for module in ("client", "chat", "errors", "reply"):
            found = getattr(import_module(f".{module}", __name__), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
