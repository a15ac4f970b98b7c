"""The way of a token's text from the engine's thread to those who read it."""

import asyncio
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.generation import Generation
from llama2_server.generation.prompt import Prompt

TEXT = "Once upon a time there was a fox who lived by the sea, and every morning she counted the boats."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(str(resources.files("llama2_server") / "demo" / "tokenizer.model")))


def generation_of(tokenizer: Tokenizer) -> Generation:
    prompt = Prompt(token_ids=(1,), raw=False)
    return Generation(prompt, GenerationParams(max_tokens=999), tokenizer, lambda counts: None)


async def test_tokens_that_come_before_the_loop_does_wake_it_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go on as one delta, whole; a token that comes later wakes the loop again, at once."""
    generation = generation_of(tokenizer)
    loop = asyncio.get_running_loop()
    wake, calls = loop.call_soon_threadsafe, 0

    def count(callback: Callable[..., Any], *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return wake(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    token_ids = tokenizer.encode_raw(TEXT)[1:]
    for token_id in token_ids[:-1]:
        generation._text.on_token(token_id)
    assert calls == 1
    deltas = generation.deltas()
    first = await anext(deltas)
    generation._text.on_token(token_ids[-1])
    assert calls == 2
    assert first + await anext(deltas) == TEXT


async def test_no_text_is_lost_between_the_threads(tokenizer: Tokenizer) -> None:
    """However the engine's thread and the event loop take turns, each token's text arrives once and in order."""
    generation = generation_of(tokenizer)
    token_ids = tokenizer.encode_raw(TEXT)[1:] * 50
    engine = threading.Thread(target=lambda: [generation._text.on_token(token_id) for token_id in token_ids])
    engine.start()
    expected, text = tokenizer.decode(token_ids), ""
    async for delta in generation.deltas():
        text += delta
        if len(text) >= len(expected):
            break
    engine.join()
    assert text == expected
