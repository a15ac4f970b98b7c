"""Checkpoints as people have them: each is served with transformers' tokens, or rejected in one line with a remedy."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.checkpoints.rejected_forms import REJECTED, make_rejected
from tests.integration.checkpoints.served_forms import SERVED
from tests.support.processes import environment
from tools.make_checkpoint import CHAT_TEMPLATE
from transformers import LlamaForCausalLM, LlamaTokenizer

from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import SequenceResult
from llama2_server.engine.text.tokenizer import ChatMessage
from llama2_server.lifecycle.model_loading import LoadedModel, load_model

BEGIN, END = "\ue000", "\ue001"  # private-use characters, which distinguish the template's tokens from a literal <s>
CHAT = [
    ChatMessage("system", "You are a llama."),
    ChatMessage("user", "Où est la gare? </s> 今天"),
    ChatMessage("assistant", "The capital of Peru is Lima."),
    ChatMessage("user", " Tell me a story about 🦙 "),
]
MAX_TOKENS = 12


class Reader:
    """Collects the tokens of a sequence."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finished = threading.Event()

    def on_token(self, token_id: int) -> bool:
        self.token_ids.append(token_id)
        return False

    def on_finish(self, result: SequenceResult) -> None:
        self.finished.set()


def test_the_corpus_is_large() -> None:
    """At least 60 forms."""
    assert len(SERVED) + len(REJECTED) >= 60


def generate(loaded: LoadedModel, prompt_ids: list[int]) -> list[int]:
    """Return the tokens of the engine, without the end token."""
    engine, reader = Engine(loaded.model, loaded.eos_ids), Reader()
    engine.submit(prompt_ids, GenerationParams(MAX_TOKENS, temperature=0), reader)
    assert reader.finished.wait(timeout=30)
    assert engine.close(timeout_seconds=10)
    return reader.token_ids


def expected_prompt(directory: Path) -> list[int]:
    """Return the prompt of transformers, each segment of the template separately."""
    tokenizer: Any = LlamaTokenizer.from_pretrained(directory)
    dialogue = [message._asdict() for message in CHAT]
    options = {"chat_template": CHAT_TEMPLATE, "bos_token": BEGIN, "eos_token": END, "tokenize": False}
    ids: list[int] = []
    for segment in tokenizer.apply_chat_template(dialogue, **options).split(BEGIN)[1:]:
        body, *ended = segment.split(END)
        ids += [1, *tokenizer(body, add_special_tokens=False, split_special_tokens=True).input_ids, *[2 for _ in ended]]
    return ids


def expected_reply(directory: Path, prompt_ids: list[int]) -> list[int]:
    """Return the tokens of transformers' greedy generation, without the end token."""
    model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = torch.tensor([prompt_ids])
    mask = torch.ones_like(prompt)
    reply = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0)
    ids: list[int] = reply[0, len(prompt_ids) :].tolist()
    ends = model.generation_config.eos_token_id
    return ids[:-1] if ids[-1] in (ends if isinstance(ends, list) else [ends]) else ids


@pytest.mark.parametrize("name", SERVED)
def test_served_forms_have_the_tokens_of_transformers(demo_card: ModelCard, tmp_path: Path, name: str) -> None:
    """Prompt and greedy reply of a chat equal transformers', read from the same directory."""
    directory = tmp_path / "a checkpoint"
    SERVED[name](directory)
    settings = {"weights": str(directory), "data_directory": tmp_path, "device": "cpu", "dtype": "float32"}
    loaded = load_model(Settings.model_validate(settings), demo_card)
    prompt_ids = loaded.tokenizer.encode_chat(CHAT)
    assert prompt_ids == expected_prompt(directory)
    assert generate(loaded, prompt_ids) == expected_reply(directory, prompt_ids)


@pytest.fixture(scope="module")
def rejections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """The exit code and the lines on standard error, by the name of the form."""
    folder = tmp_path_factory.mktemp("rejected")
    directories = make_rejected(folder)
    module = "tests.integration.checkpoints.rejecting_process"
    call = [sys.executable, "-m", module, str(folder / "state"), *map(str, directories.values())]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment())
    results = json.loads(done.stdout)
    return {name: (code, text.splitlines()) for name, (code, text) in zip(directories, results, strict=True)}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_forms_end_with_one_line(rejections: dict[str, tuple[int, list[str]]], name: str) -> None:
    """The process ends with code 2 and one line, which names the file or tensor and the remedy."""
    code, lines = rejections[name]
    *logged, line = lines
    assert code == 2, lines
    assert line.startswith("llama2-server: --weights: ")
    assert re.search(REJECTED[name][1], line), line
    assert "; " in line
    assert all(json.loads(entry)["level"] == "info" for entry in logged)
