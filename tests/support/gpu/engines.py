"""Models and engines on a GPU, and their comparison with transformers."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.support.sampling.token_reader import Reader
from transformers import LlamaForCausalLM

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.cuda.build import GpuKernels, build_step_runner
from llama2_server.engine.cuda.step_runner import CudaStepRunner
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.step_runner import StepRunner

CONTEXT = 512
SLOTS = 16
NO_EOS: frozenset[int] = frozenset()
NEAR_TIE = 0.02  # of the logits' standard deviation: float16 rounding decides between such a pair
SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": {"hidden": 256, "heads": 4, "kv_heads": 4, "ffn": 704, "context": CONTEXT},
    "grouped": {"hidden": 512, "heads": 8, "kv_heads": 2, "ffn": 1024, "context": CONTEXT},
    "heads of 128, tied": {"hidden": 512, "heads": 4, "kv_heads": 4, "ffn": 1408, "tied": True, "context": CONTEXT},
    "sharded": {"shards": 3, "layers": 3, "context": CONTEXT},
}
MakeCheckpoint = Callable[..., Path]


def load(directory: Path, device: str = "cuda", dtype: torch.dtype = torch.float16, slots: int = SLOTS) -> LlamaModel:
    """Load a checkpoint."""
    return load_model(directory, device=device, dtype=dtype, context_length=CONTEXT, slots=slots, cpu_kernels="torch")


@contextmanager
def running(
    model: LlamaModel, kernels: GpuKernels = "auto", runner: StepRunner | None = None, **options: Any
) -> Iterator[Engine]:
    """Run an engine, by default one whose steps are CUDA graphs."""
    step_runner = runner or build_step_runner(model, kernels=kernels, cache_directory=None)
    assert runner or kernels == "torch" or isinstance(step_runner, CudaStepRunner)
    engine = Engine(model, NO_EOS, step_runner=step_runner, **options)
    try:
        yield engine
    finally:
        assert engine.close(timeout_seconds=60)


def some_ids(count: int, seed: int) -> list[int]:
    """Return random tokens."""
    return random.Random(seed).choices(range(3, 600), k=count)


def generated(engine: Engine, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """Return the replies to prompts that are submitted together."""
    readers = [Reader() for _ in prompts]
    for prompt, reader in zip(prompts, readers, strict=True):
        engine.submit(prompt, GenerationParams(**{"max_tokens": 24, "temperature": 0} | params), reader)
    for reader in readers:
        reader.result()
    return [reader.token_ids for reader in readers]


def reference(directory: Path, dtype: torch.dtype, device: str = "cuda") -> Any:
    """Return transformers' model; no token ends its replies."""
    model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    model.to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def reference_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return transformers' greedy reply."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


def assert_same_except_ties(model: Any, prompt: list[int], found: list[int], expected: list[int]) -> None:
    """At the first difference, the reference hardly prefers its own token; later tokens may differ."""
    assert len(found) == len(expected)
    first_difference = next((index for index in range(len(expected)) if found[index] != expected[index]), None)
    if first_difference is None:
        return
    ids = torch.tensor([prompt + expected[:first_difference]], device=model.device)
    logits = model(ids).logits[0, -1].double()
    gap = logits[expected[first_difference]] - logits[found[first_difference]]
    assert abs(gap) <= NEAR_TIE * logits.std(), f"tokens differ at {first_difference}"
