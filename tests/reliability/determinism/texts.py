"""The requests whose texts must be equal, and one run of them: model, rows, and reuse of the KV cache."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.support.sampling.token_reader import Reader
from tests.support.service import with_config
from tools.make_checkpoint import Shape, make_checkpoint

from llama2_server.card import ModelCard, load_card
from llama2_server.config.settings import Settings
from llama2_server.engine.engine import Engine
from llama2_server.engine.model import llama
from llama2_server.engine.sampling import GenerationParams
from llama2_server.lifecycle.model_loading import LoadedModel, load_model

SHAPE = Shape(context=256)
MIN_TOKENS = 32
CHUNK_TOKENS = 16
"""Tokens per prefill step; small, so that prompts have several, and torch can reuse whole ones."""
WORDS = ("llama", "story", "wind", "hills", "a", "the", "who", "Lima", "one", "2", "?", "capital", "of", "Peru", "é")
PARAMS = (
    GenerationParams(MIN_TOKENS, temperature=0.0),
    GenerationParams(MIN_TOKENS),
    GenerationParams(MIN_TOKENS, temperature=1.0, top_p=1.0),
    GenerationParams(MIN_TOKENS, temperature=2.0, top_p=0.95),
    GenerationParams(MIN_TOKENS, temperature=0.8, top_p=1.0, top_k=40),
    GenerationParams(MIN_TOKENS, temperature=1.2, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    GenerationParams(MIN_TOKENS, temperature=0.0, repetition_penalty=1.2),
)


@dataclass(frozen=True, slots=True)
class Run:
    """How a run computes the texts."""

    name: str
    rows: int = 1
    reuse: bool = False
    """Whether prompts reuse the KV cache of earlier ones."""
    threads: int = 1
    weights: int = 0
    """The seed of the made weights."""
    other_process: bool = False
    settings: dict[str, str] = field(default_factory=dict)
    share: int = 1
    """The run computes the first of this number of equal parts of the requests, because torch is slow."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The result of a run."""

    fingerprint: str
    token_ids: list[list[int]]
    """By request."""
    reused_tokens: int
    """Prompt tokens that were not computed, over all requests."""


def requests(count: int) -> Iterator[tuple[str, GenerationParams]]:
    """Yield prompts, many of which start alike, and parameters with random seeds and lengths; always the same."""
    numbers = random.Random(0)
    starts = [" ".join(numbers.choices(WORDS, k=numbers.randrange(20, 50))) for _ in range(12)]
    for _ in range(count):
        prompt = f"{numbers.choice(starts)} {' '.join(numbers.choices(WORDS, k=numbers.randrange(1, 12)))}"
        params = numbers.choice(PARAMS)
        yield prompt, replace(params, seed=numbers.getrandbits(64), max_tokens=MIN_TOKENS + numbers.randrange(9))


def compute(run: Run, count: int, folder: Path) -> Texts:
    """Load the model as a new server does, and generate all texts."""
    checkpoint = folder / f"weights-{run.weights}"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, SHAPE, seed=run.weights)
    with _threads(run.threads):
        loaded = _load(checkpoint, folder / "data", run)
        token_ids, reused_tokens = _generate(loaded, run, count)
    assert loaded.fingerprint.value is not None
    return Texts(loaded.fingerprint.value, token_ids, reused_tokens)


def _card(rows: int) -> ModelCard:
    card = load_card("demo").model_copy(update={"context_length_limit": SHAPE.context})
    return with_config(card, max_concurrent_requests=rows)


def _load(checkpoint: Path, data_directory: Path, run: Run) -> LoadedModel:
    values = {"weights": str(checkpoint), "data_directory": data_directory, "device": "cpu", **run.settings}
    loaded = load_model(Settings.model_validate(values), _card(run.rows))
    for thread in threading.enumerate():
        if thread.name == "fingerprint":
            thread.join()
    return loaded


def _generate(loaded: LoadedModel, run: Run, count: int) -> tuple[list[list[int]], int]:
    # No token ends a sequence, so that each text has `max_tokens` tokens.
    engine = Engine(loaded.model, frozenset(), prefill_chunk_tokens=CHUNK_TOKENS, step_runner=loaded.step_runner)
    readers = []
    for prompt, params in requests(count):
        readers.append(Reader())
        scope = "account" if run.reuse else None
        engine.submit(loaded.tokenizer.encode_raw(prompt), params, readers[-1], scope)
    results = [reader.finish.result() for reader in readers]
    engine.close()
    return [reader.token_ids for reader in readers], sum(result.reused_input_tokens for result in results)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Give the model this number of threads, although it is small."""
    before = llama.SMALL_MODEL_BYTES, llama.CPU_THREADS
    llama.SMALL_MODEL_BYTES, llama.CPU_THREADS = 0, number
    try:
        yield
    finally:
        llama.SMALL_MODEL_BYTES, llama.CPU_THREADS = before
