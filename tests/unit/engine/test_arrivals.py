"""Requests that arrive at random while others run get the same tokens as alone."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, SequenceResult

CONTEXT = 128
SLOTS = 4
REQUESTS = 24
MakeCheckpoint = Callable[..., Path]
Request = tuple[list[int], GenerationParams]


class Reader:
    """Records a sequence's tokens and result, and calls `on_each_token` for each token."""

    def __init__(self, on_each_token: Callable[[], object] = lambda: None) -> None:
        self.token_ids: list[int] = []
        self.result: Future[SequenceResult] = Future()
        self._on_each_token = on_each_token

    def on_token(self, token_id: int) -> bool:
        self.token_ids.append(token_id)
        self._on_each_token()
        return False

    def on_finish(self, result: SequenceResult) -> None:
        self.result.set_result(result)


def some_requests() -> list[Request]:
    """Return greedy and sampled requests, with and without penalties, short and long."""
    rng = random.Random(7)
    return [
        (
            rng.choices(range(3, 600), k=rng.choice([1, 5, 40, 90])),
            GenerationParams(
                max_tokens=rng.randint(1, 30),
                temperature=rng.choice([0.0, 0.8, 1.5]),
                seed=rng.getrandbits(64),
                repetition_penalty=rng.choice([1.0, 1.3]),
            ),
        )
        for _ in range(REQUESTS)
    ]


def engine_of(directory: Path, dtype: torch.dtype, slots: int) -> Engine:
    model = load_model(directory, device="cpu", dtype=dtype, context_length=CONTEXT, slots=slots)
    return Engine(model, frozenset(), prefill_chunk_tokens=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_requests_do_not_change_tokens(checkpoint: MakeCheckpoint, dtype: torch.dtype) -> None:
    """Each new request arrives after a random number of tokens of the others, in the middle of their replies."""
    directory, requests = checkpoint(heads=4, kv_heads=2, dtype=dtype), some_requests()
    alone = engine_of(directory, dtype, slots=1)
    expected = []
    for prompt, params in requests:
        reader = Reader()
        alone.submit(prompt, params, reader)
        assert reader.result.result(timeout=60).reason is FinishReason.MAX_TOKENS
        expected.append(reader.token_ids)
    assert alone.close(timeout_seconds=60)

    together, rng, tokens, remaining = engine_of(directory, dtype, SLOTS), random.Random(3), threading.Semaphore(0), 0
    readers = [Reader(tokens.release) for _ in requests]
    for (prompt, params), reader in zip(requests, readers, strict=True):
        together.submit(prompt, params, reader)
        remaining += params.max_tokens
        awaited = min(rng.randint(0, 8), remaining)
        remaining -= awaited
        for _ in range(awaited):
            assert tokens.acquire(timeout=60)
    assert [reader.result.result(timeout=60).reason for reader in readers] == [FinishReason.MAX_TOKENS] * REQUESTS
    assert [reader.token_ids for reader in readers] == expected
    assert together.close(timeout_seconds=60)
