"""The text of tokens, from the engine's thread to the event loop."""

import asyncio
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from llama2_server.engine.sequence import FinishReason, SequenceResult
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.text_stream import TextStream

TEXT = "Once upon a time there was a fox who lived by the sea, and every morning she counted the boats."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(str(resources.files("llama2_server") / "demo" / "tokenizer.model")))


def stream_into(deltas: "asyncio.Queue[str]", tokenizer: Tokenizer) -> TextStream:
    """A stream that puts its text into the queue."""
    return TextStream(
        tokenizer,
        stop_sequences=(),
        input_tokens=1,
        keep_leading_space=False,
        on_progress=lambda tokens: None,
        on_text=deltas.put_nowait,
        on_finish=lambda result: None,
    )


async def test_tokens_before_the_loop_runs_wake_it_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become one delta; a later token wakes the loop again, at once."""
    deltas: asyncio.Queue[str] = asyncio.Queue()
    stream = stream_into(deltas, tokenizer)
    loop = asyncio.get_running_loop()
    wake, calls = loop.call_soon_threadsafe, 0

    def count(callback: Callable[..., Any], *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return wake(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    token_ids = tokenizer.encode_raw(TEXT)[1:]
    for token_id in token_ids[:-1]:
        stream.on_token(token_id)
    assert calls == 1
    first = await deltas.get()
    stream.on_token(token_ids[-1])
    assert calls == 2
    assert first + await deltas.get() == TEXT


async def test_no_text_is_lost_between_the_threads(tokenizer: Tokenizer) -> None:
    """However the engine's thread and the event loop interleave, each token's text arrives once and in order."""
    deltas: asyncio.Queue[str] = asyncio.Queue()
    stream = stream_into(deltas, tokenizer)
    token_ids = tokenizer.encode_raw(TEXT)[1:] * 50
    engine = threading.Thread(target=lambda: [stream.on_token(token_id) for token_id in token_ids])
    engine.start()
    expected, text = tokenizer.decode(token_ids), ""
    while len(text) < len(expected):
        text += await deltas.get()
    engine.join()
    assert text == expected


@pytest.mark.parametrize(
    ("reason", "last"),
    [(FinishReason.CANCELLED, ""), (FinishReason.FAILED, ""), (FinishReason.MAX_TOKENS, 3 * "\ufffd")],
)
async def test_a_text_that_breaks_off_never_ends_within_a_character(
    tokenizer: Tokenizer, reason: FinishReason, last: str
) -> None:
    """Only a complete reply shows that its last character is incomplete: a client continues a text that broke off."""
    deltas: asyncio.Queue[str] = asyncio.Queue()
    stream = stream_into(deltas, tokenizer)
    token_ids = tokenizer.encode_raw("a 🦊")[1:]
    for token_id in token_ids[:-1]:
        stream.on_token(token_id)
    stream.on_finish(SequenceResult(reason, 1, len(token_ids) - 1))
    await asyncio.sleep(0)
    assert deltas.get_nowait() == f"a {last}"
