"""Tests of the device step runner without CUDA graphs, against plain torch and in the engine's loop."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.sampling.token_reader import Reader
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.cuda.step_runner import CudaStepRunner, StepKernels, _HostBuffers, batch_sizes
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult

CONTEXT = 64
SLOTS = 3
NO_EOS: frozenset[int] = frozenset()
MakeCheckpoint = Callable[..., Path]


def load(directory: Path) -> LlamaModel:
    return load_model(
        directory, device="cpu", dtype=torch.float32, context_length=CONTEXT, slots=SLOTS, cpu_kernels="torch"
    )


@pytest.fixture
def model(checkpoint: MakeCheckpoint) -> LlamaModel:
    return load(checkpoint(heads=4, kv_heads=2))


class PlainForward:
    """The model's own decode step behind the interface of CudaForward; records steps and can return NaN logits."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self.rows: list[int] = []
        self.sizes: list[int] = []
        self.broken_slot: int | None = None
        self.raising_steps: set[int] = set()
        self.entered = threading.Semaphore(0)
        self.gate: threading.Semaphore | None = None

    def __call__(self, token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:  # (rows, vocab_size)
        self.entered.release()
        if len(self.sizes) in self.raising_steps:
            self.sizes.append(len(slots))
            raise RuntimeError("the device cannot run this step")
        if self.gate:
            self.gate.acquire()
        used = positions >= 0
        self.sizes.append(len(slots))
        self.rows.append(int(used.sum()))
        logits = torch.zeros(len(slots), self._model.vocab_size)
        if self.rows[-1]:
            rows = (slots[used].tolist(), token_ids[used].tolist(), positions[used].tolist())
            logits[used] = self._model.decode(*rows)
        logits[slots == self.broken_slot] = float("nan")
        return logits


@pytest.fixture
def forward(model: LlamaModel) -> PlainForward:
    return PlainForward(model)


@pytest.fixture
def engine(model: LlamaModel, forward: PlainForward) -> Iterator[Engine]:
    engine = Engine(model, NO_EOS, step_runner=CudaStepRunner(model, StepKernels(forward)))
    yield engine
    if forward.gate:
        forward.gate.release(1000)
    assert engine.close(timeout_seconds=60)


def some_ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 600), k=count)


def submit(engine: Engine, reader: Reader, prompt_tokens: int = 5, seed: int = 0, **params: Any) -> Sequence:
    fields = {"max_tokens": 8, "temperature": 0, "seed": seed} | params
    return engine.submit(some_ids(prompt_tokens, seed), GenerationParams(**fields), reader)


def plain_tokens(model: LlamaModel, prompt_tokens: int = 5, seed: int = 0, **params: Any) -> list[int]:
    """Return the tokens that the engine generates if the host samples."""
    engine, reader = Engine(model, NO_EOS), Reader()
    submit(engine, reader, prompt_tokens, seed, **params)
    reader.result()
    engine.close()
    return reader.token_ids


# Device and host sum the weights in the same order, so the same random numbers select the same tokens.
CASES: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 2, "prompt_tokens": 1},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 1.0},
    {"temperature": 0.8, "top_p": 1.0, "top_k": 50},
    {"repetition_penalty": 1.8, "max_tokens": 20},
    {"temperature": 1.5, "top_p": 0.5, "top_k": 50, "frequency_penalty": 1.0, "presence_penalty": 0.5},
]


def test_tokens_match_the_host_step_runner(checkpoint: MakeCheckpoint, engine: Engine) -> None:
    """Tokens are the same for greedy or sampled requests, with or without penalties, alone or with other requests."""
    chance = random.Random(0)
    requests = [(case, seed) for case in CASES for seed in range(3)]
    chance.shuffle(requests)
    readers = []
    for case, seed in requests:
        readers.append(Reader())
        submit(engine, readers[-1], seed=seed, **case)
        if chance.random() < 0.5:
            readers[chance.randrange(len(readers))].result()
    for (case, seed), reader in zip(requests, readers, strict=True):
        expected = plain_tokens(load(checkpoint(heads=4, kv_heads=2)), seed=seed, **case)
        assert reader.result() == SequenceResult(FinishReason.MAX_TOKENS, case.get("prompt_tokens", 5), len(expected))
        assert reader.token_ids == expected


def test_a_seed_repeats(engine: Engine) -> None:
    """The same seed gives the same tokens with any other rows in the steps; another seed gives other tokens."""
    alone, shared, neighbor, other = Reader(), Reader(), Reader(), Reader()
    engine.submit(some_ids(5, 0), GenerationParams(20, temperature=1.0, seed=1), alone)
    alone.result()
    for reader, seed in ((neighbor, 9), (shared, 1), (other, 2)):
        engine.submit(some_ids(5, 0), GenerationParams(20, temperature=1.0, seed=seed), reader)
    assert [reader.result().output_tokens for reader in (shared, neighbor, other)] == [20, 20, 20]
    assert shared.token_ids == alone.token_ids != other.token_ids


def test_the_next_step_starts_before_a_token_is_read(engine: Engine, forward: PlainForward) -> None:
    """Step N+1 starts before token N is read; a stop at token N wastes one step, which is not counted."""
    reader = Reader(stop_at=3)
    submit(engine, reader, max_tokens=20)
    assert reader.result() == SequenceResult(FinishReason.STOP_SEQUENCE, 5, 3)
    assert forward.rows == [1, 1, 1]  # for tokens 2, 3 and 4; the prefill gave the first


def test_no_step_goes_beyond_max_tokens(engine: Engine, forward: PlainForward) -> None:
    """Up to the last token of a full context, no step is started whose token cannot be used."""
    reader = Reader()
    submit(engine, reader, prompt_tokens=CONTEXT - 4, max_tokens=4)
    assert reader.result() == SequenceResult(FinishReason.MAX_TOKENS, CONTEXT - 4, 4)
    assert forward.rows == [1, 1, 1]


def test_a_cancelled_row_leaves_before_the_next_step(engine: Engine, forward: PlainForward) -> None:
    """After a cancel only the current step is computed, its token is dropped, and the slot serves the next sequence."""
    forward.gate = threading.Semaphore(0)
    reader, others = Reader(), [Reader() for _ in range(SLOTS)]
    sequence = submit(engine, reader, max_tokens=50)
    assert forward.entered.acquire(timeout=60)
    sequence.cancel()
    forward.gate.release(1)
    assert reader.result() == SequenceResult(FinishReason.CANCELLED, 5, 1)
    assert forward.rows == [1]
    forward.gate.release(1000)
    for other in others:
        submit(engine, other)
    assert [other.result().reason for other in others] == [FinishReason.MAX_TOKENS] * SLOTS


def test_a_row_without_a_token_fails_alone(engine: Engine, forward: PlainForward, model: LlamaModel) -> None:
    """NaN logits fail their sequence; the other sequence keeps its tokens, and the slot works again."""
    forward.broken_slot = 0
    forward.gate = threading.Semaphore(0)
    broken, intact, after = Reader(), Reader(), Reader()
    submit(engine, broken)
    submit(engine, intact, seed=1)
    forward.gate.release(1000)
    assert broken.result() == SequenceResult(FinishReason.FAILED, 5, 1)
    assert intact.result().reason is FinishReason.MAX_TOKENS
    forward.broken_slot = None
    submit(engine, after, seed=1)
    assert after.result().reason is FinishReason.MAX_TOKENS
    assert after.token_ids == intact.token_ids


def test_a_step_that_raises_leaves_unread_tokens_alone(checkpoint: MakeCheckpoint) -> None:
    """Tokens of an earlier step can be unread then; no later step overwrites them.

    The first step has sequences 0 and 1, and is the last one of sequence 0. The second step raises before the engine
    reads the first. Sequence 2 starts in between, so its own first token is ready before sequence 0 gets its last one.
    """
    model = load(checkpoint(heads=4, kv_heads=2))
    forward = PlainForward(model)
    runner = CudaStepRunner(model, StepKernels(forward))
    expected = plain_tokens(load(checkpoint(heads=4, kv_heads=2)), seed=0, max_tokens=2)
    sequences = [sequence_of(seed, slot=seed) for seed in range(3)]
    for sequence in sequences[:2]:
        (token,) = runner.prefill(sequence, sequence.prompt_ids)
        assert isinstance(token, int)
        sequence.output_ids.append(token)
        sequence.position = len(sequence.prompt_ids)
    unread = runner.decode(sequences[:2])
    forward.raising_steps = {1}
    with pytest.raises(RuntimeError, match="cannot run this step"):
        runner.decode(sequences[1:2])
    later = runner.prefill(sequences[2], sequences[2].prompt_ids)
    assert [sequences[0].output_ids[0], next(iter(unread))] == expected
    assert list(later) == plain_tokens(load(checkpoint(heads=4, kv_heads=2)), seed=2, max_tokens=1)


def sequence_of(seed: int, slot: int) -> Sequence:
    params = GenerationParams(max_tokens=8, temperature=0, seed=seed)
    sequence = Sequence(some_ids(5, seed), params, Reader(), None)
    sequence.slot, sequence.position = slot, 0
    return sequence


def test_waiting_for_the_device_uses_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is a blocking one; CUDA's default spins until the device has finished."""
    arguments: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **options: torch.zeros(1) if options["pin_memory"] else None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: arguments.append(options))
    _HostBuffers(1, torch.device("cuda"))
    assert arguments == [{"blocking": True}]


def test_a_prompt_with_nan_logits_fails(engine: Engine, model: LlamaModel) -> None:
    """The logits of the first token are checked too."""
    model.weights.norm.fill_(float("nan"))
    reader = Reader()
    submit(engine, reader)
    assert reader.result() == SequenceResult(FinishReason.FAILED, 5, 0)


def test_steps_are_padded_to_the_next_batch_size(engine: Engine, forward: PlainForward) -> None:
    """Three rows run in the step for four; the padding row does not change any tokens."""
    forward.gate = threading.Semaphore(0)
    readers = [Reader() for _ in range(SLOTS)]
    for seed, reader in enumerate(readers):
        submit(engine, reader, seed=seed, max_tokens=6)
    forward.gate.release(1000)
    assert all(reader.result().reason is FinishReason.MAX_TOKENS for reader in readers)
    assert (3, 4) in set(zip(forward.rows, forward.sizes, strict=True))


def test_batch_sizes_cover_every_number_of_rows() -> None:
    """One slot needs one batch size; 16 slots need the powers of two up to 16."""
    assert [batch_sizes(slots) for slots in (1, 2, 3, 16)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8, 16]]


@pytest.mark.parametrize("custom", [False, True], ids=["torch matmul", "custom matmul"])
def test_the_whole_cuda_step_matches_plain_torch(
    checkpoint: MakeCheckpoint, device: torch.device, custom: bool
) -> None:
    """In float32, the custom kernels from the embedding to the sampled token give the same tokens as plain torch."""
    from llama2_server.engine.cuda.forward import CudaForward
    from llama2_server.engine.cuda.matmul import Matmul, matmul_name
    from llama2_server.engine.cuda.matmul_kernels import TileConfig

    if device.type == "cuda":
        pytest.skip("NOT TESTED HERE: test_on_gpu.py tests this with graphs")
    model = load(checkpoint(heads=4, kv_heads=2))
    layer, config = model.weights.layers[0], TileConfig(16, 64, 4)
    weights = {"rmsnorm_linear": [layer.qkv], "linear_residual": [layer.output, layer.down], "swiglu": [layer.gate_up]}
    weights["lm_head"] = [model.weights.head]
    names = [matmul_name(kind, weight) for kind, found in weights.items() for weight in found]
    forward = CudaForward(model, Matmul(model.config.rms_norm_eps, dict.fromkeys(names, config) if custom else {}))
    engine, readers = (
        Engine(model, NO_EOS, step_runner=CudaStepRunner(model, StepKernels(forward))),
        [Reader() for _ in range(2)],
    )
    for seed, reader in enumerate(readers):
        submit(engine, reader, seed=seed, max_tokens=4)
    for seed, reader in enumerate(readers):
        reader.result()
        assert reader.token_ids == plain_tokens(load(checkpoint(heads=4, kv_heads=2)), seed=seed, max_tokens=4)
    engine.close()
