"""The step loop, on a scripted model."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from tests.support.scripted_model import ScriptedModel

from llama2_server.engine.engine import Engine
from llama2_server.engine.errors import EngineError
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult

EOS = 2
REPLY = [10, 11, 12, 13, EOS]


class Reader:
    """Records a sequence's tokens and result; a token equal to `stop_at` ends it, like a stop sequence."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.first_token = threading.Event()
        self._result: Future[SequenceResult] = Future()
        self._stop_at = stop_at

    def on_token(self, token_id: int) -> bool:
        self.token_ids.append(token_id)
        self.first_token.set()
        return token_id == self._stop_at

    def on_finish(self, result: SequenceResult) -> None:
        self._result.set_result(result)

    def result(self) -> SequenceResult:
        return self._result.result(timeout=10)


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel(REPLY, vocab_size=32, slots=2, context_length=100)


@pytest.fixture
def engine(model: ScriptedModel) -> Iterator[Engine]:
    engine = Engine(model, frozenset({EOS}), prefill_chunk_tokens=8)
    yield engine
    model.open_gate()
    assert engine.close(timeout_seconds=10)


def submit(engine: Engine, reader: Reader, max_tokens: int = 50, prompt_tokens: int = 3) -> Sequence:
    return engine.submit([5] * prompt_tokens, GenerationParams(max_tokens, temperature=0), reader)


def test_engine_without_a_free_slot_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that cannot get a slot, because the slots are lost, does not keep the engine's thread busy."""
    for _ in range(2):
        engine._running._prefix_cache.acquire(None, [5])
    waits, wait = threading.Event(), engine._wake.wait

    def observed(timeout: float | None = None) -> bool:
        waits.set()
        return wait(timeout)

    monkeypatch.setattr(engine._wake, "wait", observed)
    submit(engine, Reader())
    assert waits.wait(10)


def test_end_of_sequence_token_is_counted_but_not_passed_on(engine: Engine) -> None:
    """The end-of-sequence token counts as an output token; the listener never receives it."""
    reader = Reader()
    submit(engine, reader)
    assert reader.result() == SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)
    assert reader.token_ids == REPLY[:-1]


def test_max_tokens_ends(engine: Engine) -> None:
    """Exactly max_tokens tokens are computed."""
    reader = Reader()
    submit(engine, reader, max_tokens=2)
    assert reader.result() == SequenceResult(FinishReason.MAX_TOKENS, 3, 2)
    assert reader.token_ids == REPLY[:2]


def test_end_of_sequence_wins_over_max_tokens(engine: Engine) -> None:
    """A reply that ends by itself at its last allowed token has END_OF_SEQUENCE as its reason."""
    reader = Reader()
    submit(engine, reader, max_tokens=5)
    assert reader.result() == SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)


def test_listener_ends_a_sequence(engine: Engine) -> None:
    """When a listener returns True, the sequence ends without another token."""
    reader = Reader(stop_at=11)
    submit(engine, reader)
    assert reader.result() == SequenceResult(FinishReason.STOP_SEQUENCE, 3, 2)


def test_cancel_stops_before_the_next_step(engine: Engine, model: ScriptedModel) -> None:
    """After a cancellation only the current step is completed, and the slot becomes free."""
    model.gate()
    model.allow(1)
    reader = Reader()
    sequence = submit(engine, reader)
    assert reader.first_token.wait(10)
    assert model.in_step.wait(10)
    sequence.cancel()
    model.allow(1)
    assert reader.result() == SequenceResult(FinishReason.CANCELLED, 3, 2)
    model.open_gate()
    others = [Reader(), Reader()]
    for other in others:
        submit(engine, other)
    assert [other.result() for other in others] == [SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)] * 2


def test_cancel_during_prefill_stops_before_the_first_decode_step(engine: Engine, model: ScriptedModel) -> None:
    """A sequence that is cancelled during its prefill is not decoded."""
    model.gate()
    reader = Reader()
    sequence = submit(engine, reader)
    assert model.in_step.wait(10)
    sequence.cancel()
    model.allow(1)
    assert reader.result() == SequenceResult(FinishReason.CANCELLED, 3, 1)


def test_cancel_during_prefill_stops_between_chunks(engine: Engine, model: ScriptedModel) -> None:
    """A cancellation of a long prompt, which is prefilled in chunks, does not wait for the remaining chunks."""
    model.gate()
    reader = Reader()
    sequence = submit(engine, reader, prompt_tokens=24)
    assert model.in_step.wait(10)
    sequence.cancel()
    model.allow(1)
    assert reader.result() == SequenceResult(FinishReason.CANCELLED, 8, 0)


def test_sequences_share_steps(engine: Engine, model: ScriptedModel) -> None:
    """Sequences join a running one between steps, and share each decode step, up to the number of slots."""
    model.gate()
    readers = [Reader() for _ in range(3)]
    for reader in readers:
        submit(engine, reader)
    model.open_gate()
    assert [reader.result() for reader in readers] == [SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)] * 3
    assert [reader.token_ids for reader in readers] == [REPLY[:-1]] * 3
    assert max(model.decoded_rows) == 2


def test_an_error_fails_the_sequence_and_not_the_engine(engine: Engine, model: ScriptedModel) -> None:
    """An exception in the model fails the sequences of that step; later sequences run."""
    model.failure = RuntimeError("out of memory")
    failed, healthy = Reader(), Reader()
    submit(engine, failed)
    assert failed.result() == SequenceResult(FinishReason.FAILED, 0, 0)
    model.failure = None
    submit(engine, healthy)
    assert healthy.result() == SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)
    assert engine.alive


def test_nan_logits_fail_the_sequence(engine: Engine, model: ScriptedModel) -> None:
    """NaN logits fail the sequence and do not produce a token."""
    model.nan_logits = True
    reader = Reader()
    submit(engine, reader)
    assert reader.result() == SequenceResult(FinishReason.FAILED, 3, 0)
    assert reader.token_ids == []


def test_close_cancels_all_sequences(model: ScriptedModel) -> None:
    """Closing cancels running and queued sequences; a closed engine accepts none."""
    engine = Engine(model, frozenset({EOS}))
    model.gate()
    readers = [Reader() for _ in range(3)]
    for reader in readers:
        submit(engine, reader)
    assert model.in_step.wait(10)
    assert not engine.close(timeout_seconds=0)
    assert not engine.alive
    with pytest.raises(EngineError):
        submit(engine, Reader())
    model.open_gate()
    assert engine.close(timeout_seconds=10)
    reasons = {reader.result().reason for reader in readers}
    assert reasons == {FinishReason.CANCELLED}
    with pytest.raises(EngineError):
        submit(engine, Reader())


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(0, 1), (100, 1), (51, 50)])
def test_prompts_that_do_not_fit_are_rejected(engine: Engine, prompt_tokens: int, max_tokens: int) -> None:
    """An empty prompt, or prompt and reply beyond the context length, never reach the engine's thread."""
    with pytest.raises(ValueError):
        submit(engine, Reader(), max_tokens, prompt_tokens)


def test_every_step_is_reported(model: ScriptedModel) -> None:
    """`on_step` is called for each prefill chunk with its tokens, and for each decode step with its rows."""
    steps: list[tuple[str, int]] = []
    engine = Engine(
        model,
        frozenset({EOS}),
        prefill_chunk_tokens=8,
        on_step=lambda step: steps.append((step.phase, step.rows)) if step.seconds > 0 else None,
    )
    reader = Reader()
    submit(engine, reader, prompt_tokens=10, max_tokens=3)
    reader.result()
    assert engine.close(timeout_seconds=10)
    assert steps == [("prefill", 8), ("prefill", 2), ("decode", 1), ("decode", 1)]


def test_a_long_prompt_delays_a_stream_by_one_chunk_at_a_time(model: ScriptedModel) -> None:
    """Between two chunks of one sequence's prompt, another sequence gets its next token."""
    steps: list[tuple[str, int]] = []
    engine = Engine(
        model,
        frozenset({EOS}),
        prefill_chunk_tokens=8,
        on_step=lambda step: steps.append((step.phase, step.rows)),
    )
    model.gate()
    streaming, waiting = Reader(), Reader()
    submit(engine, streaming)
    submit(engine, waiting, prompt_tokens=32)
    model.open_gate()
    assert [streaming.result(), waiting.result()] == [
        SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5),
        SequenceResult(FinishReason.END_OF_SEQUENCE, 32, 5),
    ]
    assert engine.close(timeout_seconds=10)
    assert steps[:8] == [("prefill", 3), ("decode", 1), *[("prefill", 8), ("decode", 1)] * 3]
