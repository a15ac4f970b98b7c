"""The adapter of the async Python client: `python asynchronous.py HOST:PORT`."""

import asyncio
import json
import sys
from typing import Any

from llama2_client import Client, FinishReason, Llama2Error, Reply


def answer_of(reply: Reply) -> dict[str, Any]:
    """Return the answer for a complete reply."""
    finish = reply.finish_reason.name if isinstance(reply.finish_reason, FinishReason) else str(reply.finish_reason)
    seed, neurons = str(reply.seed), str(reply.neurons)
    return {"code": "OK", "text": reply.text, "finish_reason": finish, "seed": seed, "neurons": neurons}


async def call(client: Client, command: dict[str, Any]) -> dict[str, Any]:
    """Make one call."""
    options = dict(command["request"])
    options["timeout"] = command.get("deadline_ms", 20_000) / 1000
    if "seed" in options:
        options["seed"] = int(options["seed"])
    text = ""
    try:
        if command["call"] == "Generate":
            return answer_of(await client.generate(**options))
        async with client.stream(**options) as stream:
            count = 0
            async for delta in stream:
                text, count = text + delta, count + 1
                if count == command.get("cancel_after"):
                    return {"code": "CANCELLED", "text": text}
            return answer_of(stream.reply)
    except Llama2Error as error:
        fields = sorted(violation.field for violation in error.violations)
        return {
            "code": error.code.name, "text": text, "message": error.message, "reason": error.reason or "",
            "fields": fields, "retry_after_ms": None if error.retry_after is None else round(error.retry_after * 1000),
        }  # fmt: skip


async def main() -> None:
    """Answer each line of standard input."""
    clients: dict[str | None, Client] = {}
    for line in sys.stdin:
        command = json.loads(line)
        key = command.get("key")
        client = clients.setdefault(key, Client(sys.argv[1], api_key=key, resume=False))
        print(json.dumps(await call(client, command)), flush=True)


asyncio.run(main())
