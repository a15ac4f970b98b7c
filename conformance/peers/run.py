"""Run the text cases against other programs, with the differences that are known and explained."""

import importlib
import tempfile
from pathlib import Path
from types import MappingProxyType

from conformance.peers.adapter import running_adapter
from conformance.server_runner.run import CaseResult, run_cases
from conformance.server_runner.suite import load_cases, select
from conformance.server_runner.target import Keys, Target
from conformance.service.checkpoint import make_checkpoint

PEERS = MappingProxyType(
    {
        "transformers": "conformance.peers.huggingface:TransformersPeer",
        "llama.cpp": "conformance.peers.llama_cpp:LlamaCppPeer",
    }
)
_SPACE = "the decoder removes the space before the first word; the contract returns what the model generates"
_KEPT_SPACE = "the server keeps the space before the first word of a chat reply; the contract removes it"
_CUT = f"{_KEPT_SPACE}; the server also drops a character that is not complete"
KNOWN_DIFFERENCES: dict[str, dict[str, str]] = {
    "transformers": {
        f"text/{name}": _SPACE
        for name in ("raw-continues", "raw-keeps-spaces", "raw-keeps-newlines", "incomplete-character")
    },
    "llama.cpp": {
        f"text/chat-{name}": _KEPT_SPACE for name in ("prompt", "messages", "system", "conversation", "strips-content")
    }
    | {"text/incomplete-character": _CUT},
}
"""The cases that a program answers differently, with the reason."""


async def run_peer(name: str) -> list[CaseResult]:
    """Run the text cases against a program of `PEERS`; a known difference is a known failure.

    Raises:
        ImportError: a package of the program is not installed.
    """
    module, _, kind = PEERS[name].partition(":")
    make_peer = getattr(importlib.import_module(module), kind)
    cases = select(load_cases(), ["text/"])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        make_checkpoint(checkpoint)
        async with running_adapter(make_peer(checkpoint)) as address:
            target = Target.connect(address, Keys(), None)
            try:
                known = KNOWN_DIFFERENCES[name]
                return await run_cases(target, cases, claimed={"core"}, known_failures=known)
            finally:
                await target.close()
