"""The shipped files of the demo model."""

from __future__ import annotations

import json
import re
from functools import cache
from random import Random

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from tools.demo_model.corpus.grammar import Message, Mix, conversation
from tools.demo_model.evaluate import Answer, answer, failures, load
from tools.demo_model.export import DEMO_DIRECTORY, configuration
from tools.demo_model.network import CONTEXT_LENGTH
from tools.demo_model.prompts import Prompt
from tools.demo_model.rows import MAX_REPLY_TOKENS, Recipe
from tools.demo_model.tokenizer import VOCAB_SIZE, prompt_text, training_row

FOX = Prompt("Tell me a story about a fox who lives by the sea.", "", "any", "fox", listed=False)


@cache
def corpus() -> list[list[Message]]:
    """Return conversations of the training grammar."""
    rng = Random(11)
    return [conversation(rng, Mix()) for _ in range(800)]


@cache
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    """Return the shipped tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO_DIRECTORY / "tokenizer.model"))


def test_conversations_fit_the_context() -> None:
    """At least 98% of the conversations fit the context; training drops the others."""
    lengths = [len(training_row(tokenizer(), messages)[0]) for messages in corpus()]
    assert sum(length > CONTEXT_LENGTH for length in lengths) < len(lengths) / 50
    assert max(lengths) > CONTEXT_LENGTH * 3 / 4


def test_replies_fit_the_default_max_tokens() -> None:
    """Training drops long replies, at most a tenth, so each reply ends within the default `max_tokens` of 256."""
    replies = [m["content"] for messages in corpus() for m in messages if m["role"] == "assistant"]
    assert sum(len(ids) > MAX_REPLY_TOKENS for ids in tokenizer().encode(replies)) < len(replies) / 10
    assert MAX_REPLY_TOKENS < 255


def test_history_has_the_ids_of_the_generation() -> None:
    """A turn encoded at once, as in a later request, has the ids of the prompt followed by the ids of the reply."""
    for messages in corpus()[:200]:
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        for user, reply in zip(turns[::2], turns[1::2], strict=True):
            prompt = prompt_text(user["content"])
            separate = tokenizer().encode(prompt) + tokenizer().encode(reply["content"])
            whole = tokenizer().encode(f"{prompt} {reply['content']} ")
            assert whole[:-1] == separate


def test_tokenizer_is_small() -> None:
    """The vocabulary is the one of the recipe."""
    assert tokenizer().vocab_size() == VOCAB_SIZE


def test_directory_is_small() -> None:
    """All files of the demo model together have at most 25 MB."""
    assert sum(path.stat().st_size for path in DEMO_DIRECTORY.iterdir()) <= 25_000_000


def test_weights_are_float16_with_8_significant_bits() -> None:
    """Each weight came from bfloat16, as Llama-2's do, so the server runs it in 12 bits."""
    for name, weight in load_file(DEMO_DIRECTORY / "model.safetensors").items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight.bfloat16().half(), weight), name


def test_configs_name_the_architecture_and_no_path() -> None:
    """The configuration is the one of the recipe and contains no path of the training machine."""
    assert json.loads((DEMO_DIRECTORY / "config.json").read_text()) == configuration(Recipe().size)
    assert not [path for path in DEMO_DIRECTORY.glob("*.json") if re.search(r'"/|_name_or_path', path.read_text())]


@cache
def reply(prompt: Prompt) -> Answer:
    """Return the greedy reply."""
    return answer(prompt, load(DEMO_DIRECTORY, 0), tokenizer(), 0)


def test_first_story_keeps_to_its_prompt() -> None:
    """The story of the first prompt of the README has no non-word, and names the fox and the sea."""
    assert set(failures(reply(FOX))) <= {"pronoun"}  # one story in eight changes a pronoun
    assert {"fox", "sea"} <= set(re.findall(r"\w+", reply(FOX).text))


@pytest.mark.parametrize("name", ["Alice", "Bartholomew"])
def test_names_are_kept(name: str) -> None:
    """Names that are several pieces long are copied."""
    prompt = Prompt(f"Tell me a story about a gardener called {name} who finds a key.", name, "any", "key", listed=True)
    assert failures(reply(prompt)) == []


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("Are you a demo?", "demo"),
        ("What can you do?", "stor"),
        ("Who made you?", "The llama2-grpc project made me"),
        ("What is the capital of France?", "stor"),
    ],
)
def test_questions_have_true_answers(question: str, fact: str) -> None:
    """The model says what it is, who made it and what it cannot do."""
    assert fact in reply(Prompt(question, "", "any", "", listed=False)).text
