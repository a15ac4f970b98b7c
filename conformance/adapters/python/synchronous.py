"""The adapter of the synchronous Python client: `python synchronous.py HOST:PORT`."""

import json
import sys
from typing import Any

from llama2_client import FinishReason, Llama2Error, Reply, SyncClient


def answer_of(reply: Reply) -> dict[str, Any]:
    """Return the answer for a complete reply."""
    finish = reply.finish_reason.name if isinstance(reply.finish_reason, FinishReason) else str(reply.finish_reason)
    seed, neurons = str(reply.seed), str(reply.neurons)
    return {"code": "OK", "text": reply.text, "finish_reason": finish, "seed": seed, "neurons": neurons}


def call(client: SyncClient, command: dict[str, Any]) -> dict[str, Any]:
    """Make one call."""
    options = dict(command["request"])
    options["timeout"] = command.get("deadline_ms", 20_000) / 1000
    if "seed" in options:
        options["seed"] = int(options["seed"])
    text = ""
    try:
        if command["call"] == "Generate":
            return answer_of(client.generate(**options))
        with client.stream(**options) as stream:
            for count, delta in enumerate(stream, 1):
                text += delta
                if count == command.get("cancel_after"):
                    return {"code": "CANCELLED", "text": text}
            return answer_of(stream.reply)
    except Llama2Error as error:
        fields = sorted(violation.field for violation in error.violations)
        return {
            "code": error.code.name, "text": text, "message": error.message, "reason": error.reason or "",
            "fields": fields, "retry_after_ms": None if error.retry_after is None else round(error.retry_after * 1000),
        }  # fmt: skip


clients: dict[str | None, SyncClient] = {}
for line in sys.stdin:
    command = json.loads(line)
    key = command.get("key")
    client = clients.setdefault(key, SyncClient(sys.argv[1], api_key=key, resume=False))
    print(json.dumps(call(client, command)), flush=True)
