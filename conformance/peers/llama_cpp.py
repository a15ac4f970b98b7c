"""The checkpoint under llama.cpp's server, as the package `xllamacpp` contains it."""

from pathlib import Path
from typing import Any

import httpx2
import xllamacpp

from conformance.peers.adapter import TEMPERATURE, TOP_P, PeerReply
from conformance.peers.gguf_file import write_gguf

TIMEOUT_SECONDS = 120


class LlamaCppPeer:
    """llama.cpp's HTTP server, with its own tokenizer and the chat template of the checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        path = checkpoint / "model.gguf"
        write_gguf(checkpoint, path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        self._server = xllamacpp.Server(params)
        self._http = httpx2.Client(base_url=self._server.listening_address, trust_env=False, timeout=TIMEOUT_SECONDS)

    def complete(self, prompt: str, max_tokens: int) -> PeerReply:
        """Continue a raw prompt."""
        reply = self._post("/v1/completions", {"prompt": prompt}, max_tokens)
        return _reply(reply, reply["choices"][0]["text"])

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> PeerReply:
        """Reply to a conversation."""
        reply = self._post("/v1/chat/completions", {"messages": messages}, max_tokens)
        return _reply(reply, reply["choices"][0]["message"]["content"])

    def _post(self, path: str, body: dict[str, Any], max_tokens: int) -> Any:
        options = {"max_tokens": max_tokens, "temperature": TEMPERATURE, "top_p": TOP_P}
        return self._http.post(path, json=body | options).raise_for_status().json()


def _reply(reply: Any, text: str) -> PeerReply:
    usage = reply["usage"]
    finish_reason = "END_OF_SEQUENCE" if reply["choices"][0]["finish_reason"] == "stop" else "MAX_TOKENS"
    return PeerReply(text, finish_reason, usage["prompt_tokens"], usage["completion_tokens"])
