"""The native decode step against the torch path and against transformers, on each instruction set of this processor."""

import logging
import os
import platform
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.native import library as native
from llama2_server.engine.native.library import NativeUnavailable

CONTEXT = 128
SLOTS = 17
# Relative error of logits, in the Euclidean norm: a few roundings of float16.
TOLERANCE = 0.005
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 16": {},
    "heads of 32, grouped": {"hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352},
    "heads of 48, one key head": {"hidden": 192, "heads": 4, "kv_heads": 1},
    "heads of 64, tied": {"hidden": 128, "heads": 2, "kv_heads": 2, "tied": True},
    "heads of 128, grouped": {"hidden": 512, "heads": 4, "kv_heads": 2, "ffn": 640},
    "sizes that fill no vector": {"hidden": 100, "heads": 5, "kv_heads": 5, "ffn": 90, "vocab": 603},
}
MakeCheckpoint = Callable[..., Path]


@pytest.fixture(params=["NEON"] if platform.machine() in ("aarch64", "arm64") else ["AVX-512", "AVX2"])
def instructions(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn; those that this processor lacks are skipped, and named."""
    name: str = request.param
    if library().llama2_instructions(name.encode()) is None:
        pytest.skip(f"NOT TESTED: this processor has no {name}")
    return name


def library() -> Any:
    try:
        return native.load_library()
    except NativeUnavailable as reason:
        return pytest.skip(f"NOT TESTED: no native decode step: {reason}")


def load(directory: Path, dtype: torch.dtype = torch.float16, **options: Any) -> LlamaModel:
    """A model that decodes in torch unless told otherwise."""
    options = {"cpu_kernels": "torch"} | options
    return load_model(directory, device="cpu", dtype=dtype, context_length=CONTEXT, slots=SLOTS, **options)


def native_decoder(model: LlamaModel, instructions: str = "", threads: int = 2) -> NativeDecoder:
    library()
    return NativeDecoder(
        model.config, model.weights, model.kv_cache, model.rotary, threads=threads, instructions=instructions
    )


def some_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 600), k=count)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def prefill_all(model: LlamaModel, lengths: list[int]) -> None:
    """A prompt of its own in each slot."""
    for slot, length in enumerate(lengths):
        model.prefill(slot, some_ids(length, seed=slot), 0)


LENGTHS = [1, 127, 16, 64, 100, 2, 31, 63, 65, 3, 90, 17, 15, 126, 48, 7]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_torch(checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str) -> None:
    """Sixteen rows at ragged positions, the context's last one among them: within a few roundings of float32's."""
    directory = checkpoint(dtype=torch.float16, **shape)
    narrow, wide, torch_path = load(directory), load(directory, torch.float32), load(directory)
    for model in (narrow, wide, torch_path):
        prefill_all(model, LENGTHS)
    rows = (list(range(16)), some_ids(16, seed=99), LENGTHS)
    found = native_decoder(narrow, instructions).decode(*rows)
    assert found.dtype == torch.float32
    for row, of_torch, of_float32 in zip(found, torch_path.decode(*rows), wide.decode(*rows), strict=True):
        assert relative_error(row, of_float32) < TOLERANCE
        assert relative_error(row, of_torch) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str
) -> None:
    """Sixty tokens over keys and values of the native step's own making, as transformers has them in float32."""
    directory = checkpoint(dtype=torch.float16, **shape)
    prompt = some_ids(20)
    model = load(directory)
    reference: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference.generation_config.eos_token_id = None  # random weights would end at a random place
    reference.generation_config.pad_token_id = 0
    inputs = torch.tensor([prompt])
    output = reference.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, do_sample=False)
    expected = [int(token_id) for token_id in output[0, len(prompt) :]]
    assert greedy(model, native_decoder(model, instructions), prompt, 60) == expected


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_tokens_are_those_of_torch(checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str) -> None:
    """Along one reply the two paths choose the same token, wherever torch's roundings do not tie the best two."""
    directory = checkpoint(dtype=torch.float16, **shape)
    model, torch_path = load(directory), load(directory)
    decoder = native_decoder(model, instructions)
    ids = some_ids(20)
    model.prefill(0, ids, 0)
    torch_path.prefill(0, ids, 0)
    clear = 0
    for position in range(20, 80):
        step = ([0], ids[-1:], [position])
        logits, of_torch = decoder.decode(*step)[0], torch_path.decode(*step)[0]
        ids.append(int(logits.argmax()))
        best, second = logits.topk(2).values
        if best - second > 2 * TOLERANCE * best:
            clear += 1
            assert ids[-1] == int(of_torch.argmax())
    assert clear > 50


def greedy(model: LlamaModel, decoder: NativeDecoder, prompt: list[int], max_tokens: int) -> list[int]:
    ids = [int(model.prefill(0, prompt, 0).argmax())]
    while len(ids) < max_tokens:
        ids.append(int(decoder.decode([0], ids[-1:], [len(prompt) + len(ids) - 1]).argmax()))
    return ids


@pytest.mark.parametrize("shape", [SHAPES["heads of 32, grouped"], SHAPES["sizes that fill no vector"]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_bit_for_bit_whatever_its_neighbours(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], threads: int, instructions: str
) -> None:
    """Alone or among up to 16 others, in any order, on any number of threads: the same logits, keys and values."""
    model = load(checkpoint(dtype=torch.float16, **shape))
    prefill_all(model, LENGTHS)
    tokens = some_ids(16, seed=5)
    alone = native_decoder(model, instructions, threads=1)
    expected = [alone.decode([slot], [tokens[slot]], [LENGTHS[slot]])[0] for slot in range(16)]
    cached = [cache.clone() for cache in (*model.kv_cache.keys, *model.kv_cache.values)]
    together = native_decoder(model, instructions, threads)
    for count in range(1, 17):
        rows = random.Random(count).sample(range(16), count)
        found = together.decode(rows, [tokens[row] for row in rows], [LENGTHS[row] for row in rows])
        for row, logits in zip(rows, found, strict=True):
            assert torch.equal(logits, expected[row]), f"row {row} of {rows}"
    for before, after in zip(cached, (*model.kv_cache.keys, *model.kv_cache.values), strict=True):
        assert torch.equal(before[:16, :, 0], after[:16, :, 0])
        for slot, length in enumerate(LENGTHS):
            assert torch.equal(before[slot, :, : length + 1], after[slot, :, : length + 1])


@pytest.mark.parametrize("shape", [SHAPES["heads of 32, grouped"], SHAPES["sizes that fill no vector"]])
def test_a_prompt_is_the_same_bit_for_bit_in_whatever_pieces(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str
) -> None:
    """At once, in chunks, or decoded token by token: the same logits, and the same keys and values."""
    model = load(checkpoint(dtype=torch.float16, **shape))
    decoder, prompt = native_decoder(model, instructions), some_ids(100)
    expected = decoder.prefill(0, prompt, 0)
    for slot, size in enumerate((1, 7, 25, 48, 99), start=1):
        for start in range(0, 100, size):
            logits = decoder.prefill(slot, prompt[start : start + size], start)
        assert torch.equal(logits, expected)
    for position, token in enumerate(prompt):
        logits = decoder.decode([6], [token], [position])[0]
    assert torch.equal(logits, expected)
    for cache in (*model.kv_cache.keys, *model.kv_cache.values):
        assert all(torch.equal(cache[slot, :, :100], cache[0, :, :100]) for slot in range(1, 7))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("tokens", [1, 23, 49, CONTEXT])
def test_prefill_is_that_of_torch(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], tokens: int, instructions: str
) -> None:
    """The logits after a prompt, up to the whole context: within a few roundings of float32's, and of torch's."""
    directory = checkpoint(dtype=torch.float16, **shape)
    narrow, wide, torch_path = load(directory), load(directory, torch.float32), load(directory)
    prompt = some_ids(tokens)
    found = native_decoder(narrow, instructions).prefill(3, prompt, 0)
    assert relative_error(found, wide.prefill(3, prompt, 0)) < TOLERANCE
    assert relative_error(found, torch_path.prefill(3, prompt, 0)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_each_instruction_set_computes_the_same_bits(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str
) -> None:
    """A reply does not depend on the processor that it was computed on."""
    model = load(checkpoint(dtype=torch.float16, **shape))
    prefill_all(model, [50, 100, 1])
    rows = ([0, 1, 2], [5, 6, 7], [50, 100, 1])
    best = native_decoder(model).decode(*rows)
    assert torch.equal(native_decoder(model, instructions).decode(*rows), best)


def test_what_is_left_in_a_slot_has_no_part(checkpoint: MakeCheckpoint, instructions: str) -> None:
    """Neither behind the position nor in other slots is anything read: not even NaN makes a difference."""
    model, fresh = load(checkpoint(dtype=torch.float16)), load(checkpoint(dtype=torch.float16))
    with torch.inference_mode():
        for cache in (*model.kv_cache.keys, *model.kv_cache.values):
            cache.fill_(torch.nan)
    prompt = some_ids(20)
    found = greedy(model, native_decoder(model, instructions), prompt, 40)
    assert found == greedy(fresh, native_decoder(fresh, instructions), prompt, 40)


@pytest.mark.parametrize(
    ("slots", "tokens", "positions"),
    [
        ([SLOTS], [5], [0]),
        ([-1], [5], [0]),
        ([0], [600], [0]),
        ([0], [-1], [0]),
        ([0], [5], [CONTEXT]),
        ([0], [5], [-1]),
        ([], [], []),
        ([0] * 49, [5] * 49, list(range(49))),
    ],
)
def test_what_is_out_of_range_is_refused(
    checkpoint: MakeCheckpoint, slots: list[int], tokens: list[int], positions: list[int]
) -> None:
    """A slot, token or position that does not exist is a fault, never a read of other memory."""
    decoder = native_decoder(load(checkpoint(dtype=torch.float16)))
    with pytest.raises(EngineError):
        decoder.decode(slots, tokens, positions)


def test_threads_neither_stall_nor_mix_up_steps(checkpoint: MakeCheckpoint) -> None:
    """Thousands of tiny steps on more threads than there are cores: each ends, with the first one's logits."""
    model = load(checkpoint(dtype=torch.float16))
    prefill_all(model, [20])
    decoder = native_decoder(model, threads=(os.cpu_count() or 1) + 2)
    expected = decoder.decode([0], [5], [20])
    for _ in range(2000):
        assert torch.equal(decoder.decode([0], [5], [20]), expected)


def test_the_model_decodes_natively_and_says_so(checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture) -> None:
    """One line names the instruction set; a small model takes one thread; the logits are the native step's."""
    library()
    with caplog.at_level(logging.INFO):
        model = load(checkpoint(dtype=torch.float16), cpu_kernels="auto")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("running natively with ")
    assert line.endswith("threads: 1")
    expected = native_decoder(model).prefill(1, some_ids(20), 0)
    assert torch.equal(model.prefill(0, some_ids(20), 0), expected)
    expected = native_decoder(model).decode([0], [5], [20])
    assert torch.equal(model.decode([0], [5], [20]), expected)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """The library is looked for anew in this test, and again after it."""
    native.load_library.cache_clear()
    yield
    native.load_library.cache_clear()


def missing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(native, "LIBRARY", folder / "decode.so")


def damaged(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "decode.so").write_bytes(b"rubbish")
    patch.setattr(native, "LIBRARY", folder / "decode.so")


def outdated(patch: pytest.MonkeyPatch, folder: Path) -> None:
    library()
    native.load_library.cache_clear()
    patch.setattr(native, "INTERFACE", -1)


def another_processor(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(library(), "llama2_instructions", lambda name: None)


@pytest.mark.parametrize(
    ("break_it", "options", "reason"),
    [
        (missing, {}, "not built: install a C++ compiler, then the server anew"),
        (damaged, {}, "cannot be loaded"),
        (outdated, {}, "another version"),
        (another_processor, {}, "this processor has no AVX2"),
        (None, {"cpu_kernels": "torch"}, "the settings ask for it"),
        (None, {"dtype": torch.bfloat16}, "is for float16"),
    ],
)
@pytest.mark.usefixtures("fresh_library")
def test_where_there_is_no_native_step_torch_serves_and_one_line_says_why(
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    break_it: Callable[[pytest.MonkeyPatch, Path], None] | None,
    options: dict[str, Any],
    reason: str,
) -> None:
    """Without compiler, library or instructions the model loads and decodes; the log says what to do, once."""
    if break_it:
        break_it(monkeypatch, tmp_path)
    model = load(checkpoint(dtype=torch.float16), **({"cpu_kernels": "auto"} | options))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("running in torch, which is slower: ")
    assert reason in line
    assert "\n" not in line
    model.prefill(0, some_ids(20), 0)
    assert model.decode([0], [5], [20]).shape == (1, 600)


def test_the_read_bandwidth_is_measured() -> None:
    """What decoding is compared with: bytes a second, of memory that was really read."""
    library()
    assert native.read_bandwidth(torch.zeros(2**22), threads=2) > 0
