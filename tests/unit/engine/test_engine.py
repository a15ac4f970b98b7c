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
    """Keeps what a sequence says; `stop_at` ends it at that token, as a stop sequence would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.first_token = threading.Event()
        self.finish: Future[SequenceResult] = Future()
        self._stop_at = stop_at

    def on_token(self, token_id: int) -> bool:
        self.token_ids.append(token_id)
        self.first_token.set()
        return token_id == self._stop_at

    def on_finish(self, finish: SequenceResult) -> None:
        self.finish.set_result(finish)

    def result(self) -> SequenceResult:
        return self.finish.result(timeout=10)


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


def test_end_of_sequence_ends_and_is_counted_but_not_handed_on(engine: Engine) -> None:
    """The end-of-sequence token counts as computed; the listener never sees it."""
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
    """A reply that ends by itself at its last allowed token was not cut."""
    reader = Reader()
    submit(engine, reader, max_tokens=5)
    assert reader.result() == SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)


def test_listener_ends_a_sequence(engine: Engine) -> None:
    """A listener's True ends the sequence right there: not one token more is computed."""
    reader = Reader(stop_at=11)
    submit(engine, reader)
    assert reader.result() == SequenceResult(FinishReason.STOP_SEQUENCE, 3, 2)


def test_cancel_stops_before_the_next_step(engine: Engine, model: ScriptedModel) -> None:
    """After a cancel at most the step under way is computed, and the slot is free."""
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
    """A sequence cancelled while its prompt is read is not decoded."""
    model.gate()
    reader = Reader()
    sequence = submit(engine, reader)
    assert model.in_step.wait(10)
    sequence.cancel()
    model.allow(1)
    assert reader.result() == SequenceResult(FinishReason.CANCELLED, 3, 1)


def test_cancel_during_prefill_stops_between_chunks(engine: Engine, model: ScriptedModel) -> None:
    """A long prompt is prefilled in chunks; a cancel does not wait for the rest of it."""
    model.gate()
    reader = Reader()
    sequence = submit(engine, reader, prompt_tokens=24)
    assert model.in_step.wait(10)
    sequence.cancel()
    model.allow(1)
    assert reader.result() == SequenceResult(FinishReason.CANCELLED, 8, 0)


def test_sequences_share_steps(engine: Engine, model: ScriptedModel) -> None:
    """Sequences join the running one between steps and then share each decode step, up to the number of slots."""
    model.gate()
    readers = [Reader() for _ in range(3)]
    for reader in readers:
        submit(engine, reader)
    model.open_gate()
    assert [reader.result() for reader in readers] == [SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)] * 3
    assert [reader.token_ids for reader in readers] == [REPLY[:-1]] * 3
    assert max(model.decoded_rows) == 2


def test_fault_ends_the_sequence_and_not_the_engine(engine: Engine, model: ScriptedModel) -> None:
    """An exception in the model fails the sequences of that step; the next ones run."""
    model.failure = RuntimeError("out of memory")
    failed, healthy = Reader(), Reader()
    submit(engine, failed)
    assert failed.result() == SequenceResult(FinishReason.FAILED, 0, 0)
    model.failure = None
    submit(engine, healthy)
    assert healthy.result() == SequenceResult(FinishReason.END_OF_SEQUENCE, 3, 5)
    assert engine.alive


def test_logits_that_are_no_numbers_are_a_fault(engine: Engine, model: ScriptedModel) -> None:
    """NaN logits end the sequence with a fault instead of a made-up token."""
    model.nan_logits = True
    reader = Reader()
    submit(engine, reader)
    assert reader.result() == SequenceResult(FinishReason.FAILED, 3, 0)
    assert reader.token_ids == []


def test_close_cancels_what_runs(model: ScriptedModel) -> None:
    """Closing ends running and queued sequences; afterwards nothing is taken."""
    engine = Engine(model, frozenset({EOS}))
    model.gate()
    readers = [Reader() for _ in range(3)]
    for reader in readers:
        submit(engine, reader)
    assert model.in_step.wait(10)
    assert not engine.close(timeout_seconds=0)
    model.open_gate()
    assert engine.close(timeout_seconds=10)
    reasons = {reader.result().reason for reader in readers}
    assert reasons == {FinishReason.CANCELLED}
    with pytest.raises(EngineError):
        submit(engine, Reader())


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(0, 1), (100, 1), (51, 50)])
def test_what_does_not_fit_is_refused(engine: Engine, prompt_tokens: int, max_tokens: int) -> None:
    """An empty prompt, and prompt and reply beyond the context, never reach the thread."""
    with pytest.raises(ValueError):
        submit(engine, Reader(), max_tokens, prompt_tokens)


def test_every_step_is_told(model: ScriptedModel) -> None:
    """The observer hears of each chunk of a prompt with its tokens, and of each decode step with its rows."""
    steps: list[tuple[str, int]] = []
    engine = Engine(
        model,
        frozenset({EOS}),
        prefill_chunk_tokens=8,
        on_step=lambda phase, seconds, rows: steps.append((phase, rows)) if seconds > 0 else None,
    )
    reader = Reader()
    submit(engine, reader, prompt_tokens=10, max_tokens=3)
    reader.result()
    assert engine.close(timeout_seconds=10)
    assert steps == [("prefill", 8), ("prefill", 2), ("decode", 1), ("decode", 1)]


def test_a_long_prompt_holds_up_a_stream_for_one_chunk_at_a_time(model: ScriptedModel) -> None:
    """Between two chunks of one sequence's prompt the other one gets its next token."""
    steps: list[tuple[str, int]] = []
    engine = Engine(
        model,
        frozenset({EOS}),
        prefill_chunk_tokens=8,
        on_step=lambda phase, seconds, rows: steps.append((phase, rows)),
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
