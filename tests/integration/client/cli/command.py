"""The `llama2` command in a separate process."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import NamedTuple

COMMAND = (sys.executable, "-m", "llama2_client.cli")

# The completion of the scripted server in protobuf's JSON form, as `--json` prints it.
COMPLETION_JSON = {
    "finish_reason": "FINISH_REASON_END_OF_SEQUENCE",
    "usage": {"input_tokens": 20, "output_tokens": 13, "neurons": "12.1176", "reused_input_tokens": 16},
    "seed": "18446744073709551615",
    "cached": False,
    "request_id": "6d1a4a7d1f3e4c0e9a3b5c7d9e1f2a3b",
    "fingerprint": "f0" * 32,
    "idempotency_local": False,
    "timings": {"queue_time": "0.250s", "time_to_first_token": "0.500s", "total_time": "2s"},
}


class Result(NamedTuple):
    """The exit code and the output of a command."""

    code: int | None
    out: str
    err: str


def environment(address: str, **variables: str) -> dict[str, str]:
    """Return the environment of a command that calls the server at this address."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA2_")}
    return inherited | {"LLAMA2_ADDRESS": address} | variables


async def run(address: str, *arguments: str | bytes, stdin: bytes = b"", **variables: str) -> Result:
    """Run `llama2` with these arguments until it exits."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        env=environment(address, **variables),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin)
    return Result(process.returncode, out.decode(), err.decode())
