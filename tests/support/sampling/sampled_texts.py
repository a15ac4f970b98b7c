"""A table of sampled texts: requests with their seeds, and the tokens and texts that they must give.

    python -m tests.support.sampling.sampled_texts      # write the table again, only if texts are meant to change

The portable kernels, which small models have by default, give equal logits on every processor, so the table does not
depend on the machine. It was made with the sampler of 2026-11-25, before the rules of the reference sampler were
defined.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tests.support.sampling.token_reader import Reader
from tools.make_checkpoint import Shape, make_checkpoint

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.step_runner import HostStepRunner, StepRunner
from llama2_server.engine.text.tokenizer import Tokenizer

TABLE = Path(__file__).with_name("sampled_texts.json")
DEMO = "demo"
SHAPES = {
    "made, 600 tokens": Shape(),
    "made, 4000 tokens": Shape(hidden=96, layers=1, vocab=4000),
}
PROMPTS = {
    DEMO: (
        "[INST] Tell me a story about a fox in a forest. [/INST]",
        "[INST] Write a story about a girl who finds a key. [/INST]",
    ),
    "made, 600 tokens": ("[INST] What is the capital of Peru? [/INST]",),
    "made, 4000 tokens": ("[INST] What is the capital of Peru? [/INST]",),
}
DEFAULTS = GenerationParams(max_tokens=40)
PARAMS = (
    DEFAULTS,
    replace(DEFAULTS, seed=1),
    replace(DEFAULTS, seed=2**64 - 1),
    replace(DEFAULTS, temperature=0.5, seed=2**32),
    replace(DEFAULTS, temperature=1.0, top_p=0.5, seed=3),
    replace(DEFAULTS, temperature=2.0, top_p=0.99, seed=4),
    replace(DEFAULTS, temperature=5.0, top_p=0.999, seed=5),  # a nucleus of most of the vocabulary
    replace(DEFAULTS, temperature=1.0, top_p=1.0, seed=6),
    replace(DEFAULTS, temperature=0.8, top_p=1.0, top_k=40, seed=7),
    replace(DEFAULTS, temperature=1.5, top_p=0.9, top_k=20, seed=8),
    replace(DEFAULTS, temperature=1.2, repetition_penalty=1.3, seed=9),
    replace(DEFAULTS, temperature=1.2, repetition_penalty=0.9, seed=10),
    replace(DEFAULTS, temperature=1.2, frequency_penalty=0.7, presence_penalty=0.4, seed=11),
    replace(DEFAULTS, temperature=1.0, frequency_penalty=-0.2, presence_penalty=-0.1, seed=12),
    GenerationParams(40, 0.7, 0.9, 50, 13, 1.2, 0.4, 0.3),
    replace(DEFAULTS, temperature=0.0),
    replace(DEFAULTS, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5),
)


def load(checkpoint: Path) -> LlamaModel:
    """Load a checkpoint of the table as the service does, with three slots."""
    return load_model(checkpoint, device="cpu", dtype=torch.float16, context_length=128, slots=3)


def checkpoint_of(name: str, directory: Path) -> Path:
    """Return the demo model's checkpoint, or make another checkpoint of the table in `directory`."""
    if name == DEMO:
        return Path(str(resources.files("llama2_server") / "demo"))
    return make_checkpoint(directory / name, SHAPES[name])


def fingerprint(checkpoint: Path) -> str:
    """Return a hash of the weights, because a made checkpoint depends on torch's random numbers."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]


def sampled(
    checkpoint: Path, requests: Iterable[tuple[str, GenerationParams]], step_runner: Callable[[LlamaModel], StepRunner]
) -> list[list[int]]:
    """Return the tokens of each request; the requests share the steps of one engine."""
    tokenizer, model = Tokenizer(checkpoint / "tokenizer.model"), load(checkpoint)
    engine, readers = Engine(model, frozenset({tokenizer.eos_id}), step_runner=step_runner(model)), []
    for prompt, params in requests:
        readers.append(Reader())
        engine.submit(tokenizer.encode_raw(prompt), params, readers[-1])
    for reader in readers:
        reader.result()
    engine.close()
    return [reader.token_ids for reader in readers]


def read_table() -> list[dict[str, Any]]:
    """Return one entry per checkpoint: its name, fingerprint and replies."""
    entries: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return entries


def requests_of(entry: dict[str, Any]) -> list[tuple[str, GenerationParams]]:
    """Return the requests of an entry of the table."""
    return [(reply["prompt"], GenerationParams(**reply["params"])) for reply in entry["replies"]]


def _entry(name: str, checkpoint: Path, step_runner: Callable[[LlamaModel], StepRunner]) -> dict[str, Any]:
    requests = [(prompt, params) for prompt in PROMPTS[name] for params in PARAMS]
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    replies = [
        {"prompt": prompt, "params": _fields(params), "token_ids": ids, "text": tokenizer.decode(ids)}
        for (prompt, params), ids in zip(requests, sampled(checkpoint, requests, step_runner), strict=True)
    ]
    return {"checkpoint": name, "fingerprint": fingerprint(checkpoint), "replies": replies}


def _fields(params: GenerationParams) -> dict[str, Any]:
    return {key: value for key, value in asdict(params).items() if key != "stop"}


def _formatted(entry: dict[str, Any]) -> str:
    """Return the entry as JSON with one reply per line."""
    replies = ",\n".join(json.dumps(reply) for reply in entry["replies"])
    return (
        f'{{"checkpoint": "{entry["checkpoint"]}", "fingerprint": "{entry["fingerprint"]}", "replies": [\n{replies}]}}'
    )


def main() -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as directory:
        entries = [_entry(name, checkpoint_of(name, Path(directory)), HostStepRunner) for name in PROMPTS]
    TABLE.write_text("[\n" + ",\n".join(map(_formatted, entries)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
