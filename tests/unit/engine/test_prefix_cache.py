"""Prefix reuse keeps all tokens and logits, saves prefill, and never uses the tokens of another account."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.engine.test_engine import Reader
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.interface import Model
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, SequenceResult

CHUNK = 8
CONTEXT = 128


class Recorder:
    """A model that records its prefill sizes and logits, and fails at prefill number `fail_at`."""

    def __init__(self, model: LlamaModel) -> None:
        self.model = model
        self.vocab_size, self.context_length, self.slots = model.vocab_size, model.context_length, model.slots
        self.device, self.dtype, self.memory_bytes = model.device, model.dtype, model.memory_bytes
        self.kernels = model.kernels
        self.prefill_chunk_tokens, self.chunk_invariant = CHUNK, False
        self.prefilled: list[int] = []
        self.logits: list[Tensor] = []
        self.fail_at: int | None = None
        self.before_prefill: Callable[[], None] = lambda: None

    def prefill(self, slot: int, token_ids: list[int], position: int) -> Tensor:  # (vocab_size,)
        self.before_prefill()
        if self.fail_at == len(self.prefilled):
            raise RuntimeError("prefill failed")
        self.prefilled.append(len(token_ids))
        self.logits.append(self.model.prefill(slot, token_ids, position).clone())
        return self.logits[-1]

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Tensor:  # (rows, vocab_size)
        self.logits.append(self.model.decode(slots, token_ids, positions).clone())
        return self.logits[-1]


@pytest.fixture
def directory(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(heads=4, kv_heads=2)


def load(directory: Path, slots: int, dtype: torch.dtype = torch.float16) -> Recorder:
    return Recorder(load_model(directory, device="cpu", dtype=dtype, context_length=CONTEXT, slots=slots))


@contextmanager
def running(model: Model) -> Iterator[Engine]:
    engine = Engine(model, frozenset(), prefill_chunk_tokens=CHUNK)
    yield engine
    assert engine.close(timeout_seconds=10)


def generate(
    engine: Engine, prompt_ids: list[int], cache_scope: str | None, max_tokens: int = 5
) -> tuple[list[int], SequenceResult]:
    reader = Reader()
    engine.submit(prompt_ids, GenerationParams(max_tokens, temperature=0), reader, cache_scope)
    result = reader.result()
    return reader.token_ids, result


def some_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 600), k=count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_second_turn_computes_only_the_rest(directory: Path, dtype: torch.dtype) -> None:
    """Tokens and logits have the same bits as after a prefill from the start; the first turn's chunks are reused."""
    first = some_ids(21)
    warm, cold = load(directory, 1, dtype), load(directory, 1, dtype)
    with running(warm) as engine:
        reply, result = generate(engine, first, "a")
        assert result.reused_input_tokens == 0
        second = first + reply + some_ids(10, seed=1)
        warm.prefilled.clear()
        warm.logits.clear()
        warm_ids, result = generate(engine, second, "a")
    assert result == SequenceResult(FinishReason.MAX_TOKENS, len(second), 5, reused_input_tokens=16)
    assert warm.prefilled == [8, 8, 4]
    with running(cold) as engine:
        cold_ids, _ = generate(engine, second, "a")
    assert warm_ids == cold_ids
    reused_steps = len(cold.logits) - len(warm.logits)
    assert reused_steps == 2
    assert all(map(torch.equal, warm.logits, cold.logits[reused_steps:]))


def test_chunk_invariant_models_reuse_replies(directory: Path) -> None:
    """With the native kernels, the next turn also reuses the reply, which was computed token by token."""
    warm, cold = load(directory, 1), load(directory, 1)
    if not warm.model.chunk_invariant:
        pytest.skip("NOT TESTED NATIVELY: the native step was not built, or does not run on this processor")
    warm.chunk_invariant = True
    with running(warm) as engine:
        first = some_ids(21)
        reply, _ = generate(engine, first, "a", max_tokens=15)
        second = first + reply + some_ids(10, seed=1)
        warm.logits.clear()
        warm_ids, result = generate(engine, second, "a")
    assert result.reused_input_tokens == 21 + 14  # the last token of a reply is never in the KV cache
    with running(cold) as engine:
        cold_ids, _ = generate(engine, second, "a")
    assert warm_ids == cold_ids
    assert all(map(torch.equal, warm.logits[-5:], cold.logits[-5:]))


def test_other_accounts_reuse_nothing(directory: Path) -> None:
    """Another account, or a request without a cache scope, computes the whole prompt."""
    model = load(directory, 1)
    prompt = some_ids(40)
    with running(model) as engine:
        for cache_scope in ("a", "b", None, None, "a"):
            assert generate(engine, prompt, cache_scope)[1].reused_input_tokens == 0
        assert generate(engine, prompt, "a")[1].reused_input_tokens == 32


def test_whole_prompt_again_computes_its_last_chunk(directory: Path) -> None:
    """The logits after the last token are not cached, so its chunk is computed again, even a whole chunk."""
    model = load(directory, 1)
    with running(model) as engine:
        once = generate(engine, some_ids(24), "a")
        again = generate(engine, some_ids(24), "a")
    assert once[0] == again[0]
    assert again[1].reused_input_tokens == 16


def test_slot_with_the_longest_prefix_is_taken(directory: Path) -> None:
    """Two conversations of one account each reuse their own slot; another account takes the oldest free slot."""
    model = load(directory, 2)
    one, other = some_ids(30, seed=1), some_ids(30, seed=2)
    with running(model) as engine:
        reused = [generate(engine, prompt, "a")[1].reused_input_tokens for prompt in (one, other, one, other)]
        assert reused == [0, 0, 24, 24]
        generate(engine, some_ids(30, seed=3), "b")  # in the slot of `one`
        assert generate(engine, other, "a")[1].reused_input_tokens == 24
        assert generate(engine, one, "a")[1].reused_input_tokens == 0


def test_cancelled_prefill_keeps_its_whole_chunks(directory: Path) -> None:
    """Chunks prefilled before a cancellation are reused."""
    model = load(directory, 1)
    prompt = some_ids(40)
    reader = Reader()
    with running(model) as engine:

        def cancel_in_the_third_chunk() -> None:
            if len(model.prefilled) == 2:
                sequence.cancel()

        model.before_prefill = cancel_in_the_third_chunk
        sequence = engine.submit(prompt, GenerationParams(5, temperature=0), reader, "a")
        assert reader.result() == SequenceResult(FinishReason.CANCELLED, 24, 0)
        model.before_prefill = lambda: None
        _, result = generate(engine, prompt, "a")
    assert result.reused_input_tokens == 24


def test_cancel_before_the_first_chunk_counts_nothing(directory: Path) -> None:
    """A sequence cancelled before its first chunk has no input tokens, even if it could have reused some."""
    model = load(directory, 1)
    with running(model) as engine:
        generate(engine, some_ids(40), "a")
        blocker, reader = Reader(), Reader()
        engine.submit(some_ids(40, seed=9), GenerationParams(50, temperature=0), blocker, "b")
        engine.submit(some_ids(40), GenerationParams(5, temperature=0), reader, "a").cancel()
        assert reader.result() == SequenceResult(FinishReason.CANCELLED, 0, 0)


def test_failed_sequence_leaves_nothing_to_reuse(directory: Path) -> None:
    """After an error, the tokens of the slot are not reused."""
    model = load(directory, 1)
    with running(model) as engine:
        model.fail_at = 3
        assert generate(engine, some_ids(40), "a")[1].reason is FinishReason.FAILED
        model.fail_at = None
        assert generate(engine, some_ids(40), "a")[1].reused_input_tokens == 0


@given(
    st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 5)
)
def test_reused_tokens_are_the_longest_common_prefix(cached: list[int], prompt: list[int], chunk: int) -> None:
    """The reused tokens are equal, whole chunks, never the whole prompt, and as many as possible."""
    cache = PrefixCache(1, chunk)
    slot, _ = cache.acquire("a", cached)
    cache.release(slot, "a", cached)
    _, reused = cache.acquire("a", prompt)
    assert cached[:reused] == prompt[:reused]
    assert reused % chunk == 0
    assert reused < len(prompt)
    longer = reused + chunk
    assert longer >= len(prompt) or longer > len(cached) or cached[:longer] != prompt[:longer]
