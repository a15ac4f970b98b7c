"""The demo model: the text that it learns from, and the files that ship."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from random import Random

import pytest
import sentencepiece
from safetensors import safe_open
from tools.demo_model.evaluate import Answer, Task, answer, load, tasks
from tools.demo_model.grammar import Message, conversations
from tools.demo_model.stories import random_story
from tools.demo_model.tokenizer import EOS, IGNORED, prompt_text, training_row
from tools.demo_model.train import CONTEXT_LENGTH, DEMO
from tools.demo_model.world import HEROES, PLACES, held_out

FOX = "Tell me a story about a fox who lives by the sea."


@cache
def corpus() -> list[list[Message]]:
    """A thousand conversations of the training's grammar."""
    return list(itertools.islice(conversations(11), 1000))


@cache
def other_corpus() -> list[list[Message]]:
    """Four thousand conversations under another seed."""
    return list(itertools.islice(conversations(12), 4000))


@cache
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    """The tokenizer that ships."""
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))


def turns(messages: list[Message]) -> list[Message]:
    """The conversation without its system prompt."""
    return messages[1:] if messages[0]["role"] == "system" else messages


def test_the_same_seed_writes_the_same_text() -> None:
    """The grammar is deterministic under its seed."""
    first, second, other = (list(itertools.islice(conversations(seed), 50)) for seed in (3, 3, 4))
    assert first == second != other


def test_roles_alternate() -> None:
    """Every conversation goes user, assistant, user, ... and ends with the assistant."""
    for messages in corpus():
        roles = [message["role"] for message in turns(messages)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_no_notation_is_left_over() -> None:
    """No reply holds a placeholder, an unchosen alternative or a double space."""
    assert not [m["content"] for messages in corpus() for m in messages if re.search(r"[{}\[\]|]|  ", m["content"])]


def test_conversations_fit_the_context() -> None:
    """Nearly every conversation fits the context; the trainer drops the others."""
    lengths = [len(training_row(tokenizer(), messages)[0]) for messages in corpus()]
    assert sum(length > CONTEXT_LENGTH for length in lengths) < len(lengths) / 50
    assert max(lengths) > CONTEXT_LENGTH * 3 / 4


def test_replies_fit_the_default_max_tokens() -> None:
    """Every reply of the training text is shorter than the default `max_tokens` of 256."""
    replies = [m["content"] for messages in corpus() for m in messages if m["role"] == "assistant"]
    assert max(len(ids) for ids in tokenizer().encode(replies)) < 255


def test_history_has_the_ids_that_generation_had() -> None:
    """A turn encoded at once, as in a later request, equals the prompt's ids followed by the reply's."""
    for messages in corpus()[:200]:
        for user, reply in itertools.pairwise(turns(messages)):
            if user["role"] == "user":
                prompt = prompt_text(user["content"])
                apart = tokenizer().encode(prompt) + tokenizer().encode(reply["content"])
                whole = tokenizer().encode(f"{prompt} {reply['content']} ")
                assert whole[:-1] == apart


def test_the_loss_is_on_replies_alone() -> None:
    """The labels are the replies and their ends; the last word is followed by the end."""
    ids, labels = training_row(
        tokenizer(), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho!"}]
    )
    reply = tokenizer().encode("Ho!")
    assert [label for label in labels if label != IGNORED] == [*reply, EOS, EOS]
    assert ids[-1] == EOS


@pytest.mark.parametrize("hero", ["fox", "owl", "robot"])
def test_held_out_pairs_are_never_in_the_text(hero: str) -> None:
    """No story is told about a pair of character and place that is kept for the evaluation."""
    phrases = "|".join(re.escape(place.phrase) for place in PLACES if held_out(hero, place))
    told = re.compile(rf"\b{hero}\b[^.]*? (?:who )?lived (?:{phrases})\b[,.]")
    openings = re.compile(rf"once an? (?:\w+ )?{hero} (?:{phrases}),")
    for messages in other_corpus():
        for message in messages:
            assert not told.search(message["content"])
            assert not openings.search(message["content"])


def test_nobody_in_a_story_is_in_a_held_out_place() -> None:
    """Neither the character of a story nor the friend is ever in a place that is held out for them."""
    rng = Random(13)
    for story in (random_story(rng) for _ in range(3000)):
        assert not held_out(story.hero, story.place)
        assert not held_out(story.friend, story.place)


def test_an_eighth_of_the_pairs_is_held_out() -> None:
    """At least one pair in ten is held out, the fox by the sea among them."""
    pairs = [held_out(hero, place) for hero in HEROES for place in PLACES]
    assert sum(pairs) / len(pairs) > 0.1
    assert all(held_out(task.hero, task.place) for task in tasks(200))
    assert held_out("fox", next(place for place in PLACES if place.noun == "sea"))


def test_the_directory_is_small() -> None:
    """All files of the demo model together take at most 12 MB."""
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 12_000_000


def test_the_weights_are_fp16() -> None:
    """Every tensor is stored in half precision."""
    with safe_open(DEMO / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_configs_name_the_architecture_and_no_path() -> None:
    """The configs are those of a Llama checkpoint and say nothing about the machine that made them."""
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == CONTEXT_LENGTH
    assert not [path for path in DEMO.glob("*.json") if re.search(r'"/|_name_or_path', path.read_text())]


@cache
def fox_by_the_sea() -> Answer:
    """The greedy reply to the README's first prompt."""
    sea = next(place for place in PLACES if place.noun == "sea")
    return answer(Task("fox", sea, FOX), load(DEMO, 0), tokenizer())


def test_the_first_story_ends_by_itself() -> None:
    """The story of the fox ends within 256 tokens."""
    assert fox_by_the_sea().ended


def test_the_first_story_keeps_to_its_subject() -> None:
    """The story of the fox by the sea names the fox and the sea, and does not repeat itself."""
    assert fox_by_the_sea().kept
    assert not fox_by_the_sea().repeats
