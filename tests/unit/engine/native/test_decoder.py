"""Tests of the native forward pass against torch and transformers, on each instruction set of this processor."""

import os
import random
from itertools import product
from typing import Any

import pytest
import torch
from tests.unit.engine.native.models import (
    CONTEXT,
    SLOTS,
    MakeCheckpoint,
    load,
    native_decoder,
    prefill_all,
    some_ids,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_decoder import NativeDecoder, SlotTokens
from llama2_server.engine.model.native_sampler import NO_TOKEN, NativeSampler
from llama2_server.engine.sampling import GenerationParams

# Maximum relative error of logits in the Euclidean norm: a few float16 roundings.
TOLERANCE = 0.005
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 16": {},
    "heads of 32, grouped": {"hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352},
    "heads of 48, one key head": {"hidden": 192, "heads": 4, "kv_heads": 1},
    "heads of 64, tied": {"hidden": 128, "heads": 2, "kv_heads": 2, "tied": True},
    "heads of 128, grouped": {"hidden": 512, "heads": 4, "kv_heads": 2, "ffn": 640},
    "sizes that do not fill a vector": {"hidden": 100, "heads": 5, "kv_heads": 5, "ffn": 90, "vocab": 603},
    "sizes that do not fill tiles": {"hidden": 144, "heads": 3, "kv_heads": 1, "ffn": 208, "vocab": 603},
}

UNEVEN = ("heads of 32, grouped", "sizes that do not fill a vector", "sizes that do not fill tiles")


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


SAMPLED = [
    (GenerationParams(1, temperature, top_p, top_k, seed, 1.0 + seed % 3 / 10), [1, 2, 3], 600)
    for seed, (temperature, top_p, top_k) in enumerate(product((0.0, 0.6), (0.5, 0.9, 0.999, 1.0), (0, 50)))
]
LENGTHS = [1, 127, 16, 64, 100, 2, 31, 63, 65, 3, 90, 17, 15, 126, 48, 7]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_match_torch(checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str) -> None:
    """16 rows at ragged positions, including the last of the context, differ from float32 by a few roundings."""
    directory = checkpoint(dtype=torch.float16, **shape)
    narrow, wide, torch_path = load(directory), load(directory, torch.float32), load(directory)
    for model in (narrow, wide, torch_path):
        prefill_all(model, LENGTHS)
    rows = (list(range(16)), some_ids(16, seed=99), LENGTHS)
    found = native_decoder(narrow, instructions).decode(*rows)
    assert found.dtype == torch.float32
    for row, torch_row, float32_row in zip(found, torch_path.decode(*rows), wide.decode(*rows), strict=True):
        assert relative_error(row, float32_row) < TOLERANCE
        assert relative_error(row, torch_row) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_tokens_match_transformers(checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str) -> None:
    """60 tokens, computed over natively written keys and values, match transformers in float32."""
    directory = checkpoint(dtype=torch.float16, **shape)
    prompt = some_ids(20)
    model = load(directory)
    reference: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference.generation_config.eos_token_id = None  # random weights would end the reply at a random token
    reference.generation_config.pad_token_id = 0
    inputs = torch.tensor([prompt])
    output = reference.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, do_sample=False)
    expected = [int(token_id) for token_id in output[0, len(prompt) :]]
    assert greedy(model, native_decoder(model, instructions), prompt, 60) == expected


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_tokens_match_torch(checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str) -> None:
    """Both paths choose the same token at each step, except where rounding in torch ties the best two."""
    directory = checkpoint(dtype=torch.float16, **shape)
    model, torch_path = load(directory), load(directory)
    decoder = native_decoder(model, instructions)
    ids = some_ids(20)
    model.prefill(0, ids, 0)
    torch_path.prefill(0, ids, 0)
    clear = 0
    for position in range(20, 80):
        step = ([0], ids[-1:], [position])
        logits, torch_row = decoder.decode(*step)[0], torch_path.decode(*step)[0]
        ids.append(int(logits.argmax()))
        best, second = logits.topk(2).values
        if best - second > 2 * TOLERANCE * best:
            clear += 1
            assert ids[-1] == int(torch_row.argmax())
    assert clear > 50


def greedy(model: LlamaModel, decoder: NativeDecoder, prompt: list[int], max_tokens: int) -> list[int]:
    ids = [int(model.prefill(0, prompt, 0).argmax())]
    while len(ids) < max_tokens:
        ids.append(int(decoder.decode([0], ids[-1:], [len(prompt) + len(ids) - 1]).argmax()))
    return ids


@pytest.mark.parametrize("shape", [SHAPES[name] for name in UNEVEN])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_with_any_neighbors(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], threads: int, instructions: str
) -> None:
    """Logits, keys and values are the same with up to 15 other rows in any order, on any number of threads."""
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


@pytest.mark.parametrize("shape", [SHAPES[name] for name in UNEVEN])
def test_a_prompt_has_the_same_bits_in_any_chunks(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], instructions: str
) -> None:
    """Logits, keys and values are the same for one prefill, for chunks, and for token-by-token decoding."""
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
def test_prefill_matches_torch(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], tokens: int, instructions: str
) -> None:
    """Logits after a prompt of up to the whole context differ by a few roundings from float32 and from torch."""
    directory = checkpoint(dtype=torch.float16, **shape)
    narrow, wide, torch_path = load(directory), load(directory, torch.float32), load(directory)
    prompt = some_ids(tokens)
    found = native_decoder(narrow, instructions).prefill(3, prompt, 0)
    assert relative_error(found, wide.prefill(3, prompt, 0)) < TOLERANCE
    assert relative_error(found, torch_path.prefill(3, prompt, 0)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_each_portable_instruction_set_computes_the_same_bits(
    checkpoint: MakeCheckpoint, shape: dict[str, Any], portable_instructions: str
) -> None:
    """With the portable kernels, a reply does not depend on the processor that computes it."""
    model = load(checkpoint(dtype=torch.float16, **shape))
    prefill_all(model, [50, 100, 1])
    rows = ([0, 1, 2], [5, 6, 7], [50, 100, 1])
    best = native_decoder(model).decode(*rows)
    assert torch.equal(native_decoder(model, portable_instructions).decode(*rows), best)


def sample(
    decoder: NativeDecoder, slots: list[int], tokens: list[int], positions: list[int], samplers: list[NativeSampler]
) -> list[int]:
    """Sample one token of each slot in one step."""
    parts = [SlotTokens(slot, [tokens[row]], positions[row], samplers[row]) for row, slot in enumerate(slots)]
    return [token for (token,) in decoder.sample(parts)]


def sample_after_prompt(decoder: NativeDecoder, slot: int, prompt: list[int], sampler: NativeSampler) -> list[int]:
    """Sample the first token of a reply."""
    for start in range(0, len(prompt) - 1, 40):
        end = min(start + 40, len(prompt) - 1)
        assert decoder.sample([SlotTokens(slot, prompt[start:end], start)]) == []
    return decoder.sample([SlotTokens(slot, prompt[-1:], len(prompt) - 1, sampler)])[0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_samples_the_tokens_of_its_logits(checkpoint: MakeCheckpoint, threads: int, instructions: str) -> None:
    """Rows with different parameters get the tokens that their logits give, on any number of threads."""
    model = load(checkpoint(dtype=torch.float16))
    decoder, tokens = native_decoder(model, instructions, threads), some_ids(16, seed=5)
    samplers, references = ([NativeSampler(*arguments) for arguments in SAMPLED] for _ in range(2))
    for slot, (sampler, reference) in enumerate(zip(samplers, references, strict=True)):
        prompt = some_ids(LENGTHS[slot], seed=slot)
        expected = reference.sample(decoder.prefill(slot, prompt, 0)[None])
        assert sample_after_prompt(decoder, slot, prompt, sampler) == expected
    for step in range(2):
        rows = (list(range(16)), tokens, [length + step - 1 for length in LENGTHS])
        logits = decoder.decode(*rows)[:, None]
        expected = [reference.sample(row)[0] for reference, row in zip(references, logits, strict=True)]
        assert sample(decoder, *rows, samplers) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_guesses_are_sampled_up_to_the_first_wrong_one(
    checkpoint: MakeCheckpoint, threads: int, instructions: str
) -> None:
    """Right guesses give the tokens of successive steps; rows after a wrong one change no sampler."""
    decoder = native_decoder(load(checkpoint(dtype=torch.float16)), instructions, threads)
    plain, guessing = ([NativeSampler(*arguments) for arguments in SAMPLED] for _ in range(2))
    replies: list[list[int]] = []
    for slot, sampler in enumerate(plain):
        reply = sample_after_prompt(decoder, slot, some_ids(20, seed=slot), sampler)
        for position in range(20, 30):
            reply += sample(decoder, [slot], reply[-1:], [position], [sampler])
        replies.append(reply)
    for slot, (sampler, reply) in enumerate(zip(guessing, replies, strict=True)):
        assert sample_after_prompt(decoder, slot, some_ids(20, seed=slot), sampler) == reply[:1]
    for first in range(0, 8, 2):
        # A right guess and a wrong one: three rows for each of 16 sequences.
        parts = [
            SlotTokens(slot, [*reply[first : first + 2], (reply[first + 2] + 1) % 600], 20 + first, guessing[slot])
            for slot, reply in enumerate(replies)
        ]
        found = decoder.sample(parts)
        assert found == [reply[first + 1 : first + 3] for reply in replies]


def test_a_row_without_finite_logits_has_no_token(checkpoint: MakeCheckpoint) -> None:
    """The other rows of the step keep their tokens."""
    model = load(checkpoint(dtype=torch.float16))
    prefill_all(model, [20, 20, 20])
    decoder, rows = native_decoder(model), ([0, 1, 2], [5, 6, 7], [20, 20, 20])
    expected = sample(decoder, *rows, [NativeSampler(*SAMPLED[1]) for _ in range(3)])
    with torch.inference_mode():
        model.kv_cache.values[0][1, :, :20] = torch.nan
    found = sample(decoder, *rows, [NativeSampler(*SAMPLED[1]) for _ in range(3)])
    assert found == [expected[0], NO_TOKEN, expected[2]]


def test_a_sampler_of_another_vocabulary_is_rejected(checkpoint: MakeCheckpoint) -> None:
    """It would read beyond the logits."""
    decoder = native_decoder(load(checkpoint(dtype=torch.float16)))
    with pytest.raises(EngineError, match="another vocabulary"):
        sample(decoder, [0], [5], [0], [NativeSampler(GenerationParams(1), [], 601)])


def test_stale_cache_content_is_never_read(checkpoint: MakeCheckpoint, instructions: str) -> None:
    """Nothing behind the position or in other slots is read: even NaN there makes no difference."""
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
def test_out_of_range_arguments_are_rejected(
    checkpoint: MakeCheckpoint, slots: list[int], tokens: list[int], positions: list[int]
) -> None:
    """A slot, token or position that does not exist raises an error and never reads other memory."""
    decoder = native_decoder(load(checkpoint(dtype=torch.float16)))
    with pytest.raises(EngineError):
        decoder.decode(slots, tokens, positions)


def test_threads_neither_stall_nor_mix_up_steps(checkpoint: MakeCheckpoint) -> None:
    """Each of 2,000 tiny steps on more threads than cores ends and returns the same logits."""
    model = load(checkpoint(dtype=torch.float16))
    prefill_all(model, [20])
    decoder = native_decoder(model, threads=(os.cpu_count() or 1) + 2)
    expected = decoder.decode([0], [5], [20])
    for _ in range(2000):
        assert torch.equal(decoder.decode([0], [5], [20]), expected)
