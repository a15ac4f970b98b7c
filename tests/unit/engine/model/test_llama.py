"""The forward pass against transformers' LlamaForCausalLM, token for token."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.interface import Model
from llama2_server.engine.model.llama import LlamaModel

CONTEXT = 128
SHAPES: dict[str, dict[str, int]] = {
    "multi-head": {},
    "grouped": {"heads": 4, "kv_heads": 2},
    "one key head": {"heads": 4, "kv_heads": 1},
    "tied": {"tied": True},
    "sharded": {"shards": 3, "layers": 3},
    "odd sizes": {"hidden": 96, "heads": 3, "kv_heads": 3, "ffn": 100, "layers": 1},
}
MakeCheckpoint = Callable[..., Path]


def load(directory: Path, dtype: torch.dtype = torch.float32, slots: int = 3) -> LlamaModel:
    return load_model(directory, device="cpu", dtype=dtype, context_length=CONTEXT, slots=slots)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 600), k=count)


def greedy(model: LlamaModel, prompt_ids: list[int], max_tokens: int) -> list[int]:
    ids = [int(model.prefill(0, prompt_ids, 0).argmax())]
    while len(ids) < max_tokens:
        ids.append(int(model.decode([0], ids[-1:], [len(prompt_ids) + len(ids) - 1]).argmax()))
    return ids


def reference_greedy(directory: Path, prompt_ids: list[int], max_tokens: int) -> list[int]:
    reference: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # No end-of-sequence token, because random weights would generate one at random.
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 0
    prompt = torch.tensor([prompt_ids])
    output = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False
    )
    return [int(token_id) for token_id in output[0, len(prompt_ids) :]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(1, CONTEXT), (20, 60), (CONTEXT, 1)])
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: MakeCheckpoint, shape: dict[str, int], prompt_tokens: int, max_tokens: int
) -> None:
    """From a single token to the full context, each greedy token equals that of transformers."""
    directory = checkpoint(**shape)
    prompt_ids = some_ids(prompt_tokens)
    assert greedy(load(directory), prompt_ids, max_tokens) == reference_greedy(directory, prompt_ids, max_tokens)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.005), (torch.bfloat16, 0.04)])
def test_16_bit_logits_are_close_to_float32(checkpoint: MakeCheckpoint, dtype: torch.dtype, bound: float) -> None:
    """The relative error of 16-bit logits, in the Euclidean norm, is a few roundings in prefill and decode."""
    directory = checkpoint(dtype=dtype, layers=4)
    narrow, wide = load(directory, dtype), load(directory)
    ids = some_ids(100)
    assert relative_error(narrow.prefill(0, ids, 0), wide.prefill(0, ids, 0)) < bound
    assert relative_error(narrow.decode([0], [7], [100]), wide.decode([0], [7], [100])) < bound


@pytest.mark.parametrize("shape", [SHAPES["multi-head"], SHAPES["grouped"]], ids=["multi-head", "grouped"])
def test_later_chunks_on_a_gpu_can_use_flash_attention(
    checkpoint: MakeCheckpoint, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their mask is torch's lower-right causal bias, with the same logits as the mask of numbers on a CPU."""
    directory, ids = checkpoint(**shape), some_ids(100)
    models = [
        load_model(directory, device="cpu", dtype=torch.float32, context_length=CONTEXT, slots=1, cpu_kernels="torch")
        for _ in range(2)
    ]
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    masks: list[Any] = []

    def chunk_mask(position: int, end: int) -> Tensor | None:
        mask = LlamaModel._chunk_mask(on_gpu, position, end)
        masks.append(mask)
        return mask

    monkeypatch.setattr(models[1], "_chunk_mask", chunk_mask)
    for start, end in ((0, 60), (60, 99), (99, 100)):
        expected, found = (model.prefill(0, ids[start:end], start) for model in models)
        assert torch.equal(found, expected)
    assert masks[0] is None
    assert [(mask.variant.name, mask.seq_len_q, mask.seq_len_kv) for mask in masks[1:]] == [
        ("LOWER_RIGHT", 39, 99),
        ("LOWER_RIGHT", 1, 100),
    ]


@pytest.mark.parametrize("shape", [SHAPES["multi-head"], SHAPES["grouped"]])
@pytest.mark.parametrize("chunk", [1, 2, 7, 63, 99])
def test_chunked_prefill_equals_whole_prefill(checkpoint: MakeCheckpoint, shape: dict[str, int], chunk: int) -> None:
    """The logits after a prompt and its KV cache do not depend on the chunk size."""
    whole, chunked = load(checkpoint(**shape)), load(checkpoint(**shape))
    ids = some_ids(100)
    for start in range(0, 100, chunk):
        logits = chunked.prefill(1, ids[start : start + chunk], start)
    torch.testing.assert_close(logits, whole.prefill(1, ids, 0))
    torch.testing.assert_close(chunked.decode([1], [9], [100]), whole.decode([1], [9], [100]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_one_step_equal_separate_steps(checkpoint: MakeCheckpoint, dtype: torch.dtype) -> None:
    """Sequences of different lengths that share a decode step get the same logits as alone, bit for bit."""
    directory = checkpoint(**SHAPES["grouped"], dtype=dtype)
    together, alone = load(directory, dtype), load(directory, dtype)
    slots, lengths = [2, 0, 1], [5, 60, 1]
    for model in (together, alone):
        for slot, length in zip(slots, lengths, strict=True):
            model.prefill(slot, some_ids(length, seed=slot), 0)
    for step in range(3):
        positions = [length + step for length in lengths]
        rows = together.decode(slots, [11, 12, 13], positions)
        for row, *one in zip(rows, slots, [11, 12, 13], positions, strict=True):
            slot, token_id, position = one
            expected = alone.decode([slot], [token_id], [position])[0]
            assert torch.equal(row, expected)


def test_earlier_slot_content_has_no_effect(checkpoint: MakeCheckpoint) -> None:
    """Old or uninitialized content of a slot, even NaN, does not affect the next sequence."""
    model, fresh = load(checkpoint()), load(checkpoint())
    with torch.inference_mode():
        for cached in (*model.kv_cache.keys, *model.kv_cache.values):
            cached.fill_(torch.nan)
    assert greedy(model, some_ids(20), 40) == greedy(fresh, some_ids(20), 40)


def test_slots_are_independent(checkpoint: MakeCheckpoint) -> None:
    """A prefill and decode steps in one slot do not change the sequence in another slot."""
    model = load(checkpoint())
    model.prefill(0, some_ids(30), 0)
    before = model.decode([0], [5], [30])
    model.prefill(1, some_ids(CONTEXT, seed=1), 0)
    model.prefill(2, some_ids(3, seed=2), 0)
    model.decode([2], [8], [3])
    torch.testing.assert_close(model.decode([0], [5], [30]), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("slot", "tokens", "position"), [(3, 1, 0), (-1, 1, 0), (0, 0, 0), (0, 1, CONTEXT), (0, 2, CONTEXT - 1), (0, 1, -1)]
)
def test_tokens_that_do_not_fit_are_rejected(checkpoint: MakeCheckpoint, slot: int, tokens: int, position: int) -> None:
    """A nonexistent slot, an empty prompt, or tokens beyond the context length raise an error."""
    with pytest.raises(EngineError, match=f"slot {slot} "):
        load(checkpoint()).prefill(slot, some_ids(tokens), position)


def test_a_full_slot_rejects_a_token(checkpoint: MakeCheckpoint) -> None:
    """A decode step after the last position is rejected, even if another row fits."""
    with pytest.raises(EngineError, match="slot 1 "):
        load(checkpoint()).decode([0, 1], [5, 5], [0, CONTEXT])


def test_the_model_implements_the_interface_of_the_step_loop(checkpoint: MakeCheckpoint) -> None:
    """It reports its numbers of logits, tokens and slots, and returns float32 logits for all dtypes."""
    model: Model = load(checkpoint(dtype=torch.float16), torch.float16)
    assert (model.vocab_size, model.context_length, model.slots) == (600, CONTEXT, 3)
    assert model.prefill(0, [1], 0).dtype == model.decode([0], [1], [1]).dtype == torch.float32


@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_memory_is_weights_and_kv_cache(checkpoint: MakeCheckpoint, name: str) -> None:
    """On a CPU, the memory of a model is the size of its tensors, plus keys and values for each slot."""
    directory = checkpoint(**SHAPES[name])
    model = load(directory, slots=2)
    config = model.config
    tensors = sum(tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values())
    cache = 2 * config.layers * 2 * config.kv_heads * CONTEXT * config.head_dim * 4
    assert model.memory_bytes == tensors + cache
