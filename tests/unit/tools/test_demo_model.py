"""The demo model: its training text and its shipped files."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from random import Random

import sentencepiece
from safetensors import safe_open
from tools.demo_model.evaluate import Answer, Task, answer, load, tasks
from tools.demo_model.grammar import Message, conversations
from tools.demo_model.stories import random_story
from tools.demo_model.tokenizer import EOS, IGNORED, prompt_text, training_row
from tools.demo_model.train import CONTEXT_LENGTH, DEMO_DIRECTORY
from tools.demo_model.world import HEROES, PLACES, held_out

FOX = "Tell me a story about a fox who lives by the sea."


@cache
def corpus() -> list[list[Message]]:
    """Return a thousand conversations of the training grammar."""
    return list(itertools.islice(conversations(11), 1000))


@cache
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    """Return the shipped tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO_DIRECTORY / "tokenizer.model"))


def turns(messages: list[Message]) -> list[Message]:
    """Return the conversation without its system prompt."""
    return messages[1:] if messages[0]["role"] == "system" else messages


def test_grammar_is_deterministic() -> None:
    """Equal seeds give equal conversations, and other seeds give others."""
    first, second, other = (list(itertools.islice(conversations(seed), 50)) for seed in (3, 3, 4))
    assert first == second != other


def test_roles_alternate() -> None:
    """Every conversation alternates user and assistant, and ends with the assistant."""
    for messages in corpus():
        roles = [message["role"] for message in turns(messages)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_text_has_no_template_notation() -> None:
    """No message contains a placeholder, an unresolved alternative or a double space."""
    assert not [m["content"] for messages in corpus() for m in messages if re.search(r"[{}\[\]|]|  ", m["content"])]


def test_conversations_fit_the_context() -> None:
    """At least 98% of the conversations fit the context; training drops the others."""
    lengths = [len(training_row(tokenizer(), messages)[0]) for messages in corpus()]
    assert sum(length > CONTEXT_LENGTH for length in lengths) < len(lengths) / 50
    assert max(lengths) > CONTEXT_LENGTH * 3 / 4


def test_replies_fit_the_default_max_tokens() -> None:
    """Every reply in the training text is shorter than the default `max_tokens` of 256."""
    replies = [m["content"] for messages in corpus() for m in messages if m["role"] == "assistant"]
    assert max(len(ids) for ids in tokenizer().encode(replies)) < 255


def test_history_has_the_ids_of_the_generation() -> None:
    """A turn encoded at once, as in a later request, has the ids of the prompt followed by the ids of the reply."""
    for messages in corpus()[:200]:
        for user, reply in itertools.pairwise(turns(messages)):
            if user["role"] == "user":
                prompt = prompt_text(user["content"])
                separate = tokenizer().encode(prompt) + tokenizer().encode(reply["content"])
                whole = tokenizer().encode(f"{prompt} {reply['content']} ")
                assert whole[:-1] == separate


def test_only_replies_have_labels() -> None:
    """The labels are the replies and their ends; the label after the last word is the end."""
    ids, labels = training_row(
        tokenizer(), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho!"}]
    )
    reply = tokenizer().encode("Ho!")
    assert [label for label in labels if label != IGNORED] == [*reply, EOS, EOS]
    assert ids[-1] == EOS


def test_no_character_is_in_a_held_out_place() -> None:
    """Neither the main character of a story nor the friend is in a place that is held out for it."""
    rng = Random(13)
    for story in (random_story(rng) for _ in range(3000)):
        assert not held_out(story.hero, story.place)
        assert not held_out(story.friend, story.place)


def test_held_out_share_of_the_pairs() -> None:
    """At least one pair in ten is held out, the fox by the sea among them."""
    pairs = [held_out(hero, place) for hero in HEROES for place in PLACES]
    assert sum(pairs) / len(pairs) > 0.1
    assert all(held_out(task.hero, task.place) for task in tasks(200))
    assert held_out("fox", next(place for place in PLACES if place.noun == "sea"))


def test_directory_is_small() -> None:
    """All files of the demo model together have at most 12 MB."""
    assert sum(path.stat().st_size for path in DEMO_DIRECTORY.iterdir()) <= 12_000_000


def test_weights_are_float16() -> None:
    """Every tensor is stored in half precision."""
    with safe_open(DEMO_DIRECTORY / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_configs_name_the_architecture_and_no_path() -> None:
    """The configuration files describe a Llama checkpoint and contain no path of the training machine."""
    config = json.loads((DEMO_DIRECTORY / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == CONTEXT_LENGTH
    assert not [path for path in DEMO_DIRECTORY.glob("*.json") if re.search(r'"/|_name_or_path', path.read_text())]


@cache
def fox_by_the_sea() -> Answer:
    """Return the greedy reply to the first prompt of the README."""
    sea = next(place for place in PLACES if place.noun == "sea")
    return answer(Task("fox", sea, FOX), load(DEMO_DIRECTORY, 0), tokenizer())


def test_first_story_ends_by_itself() -> None:
    """The story of the fox ends within 256 tokens."""
    assert fox_by_the_sea().ended


def test_first_story_is_on_topic() -> None:
    """The story of the fox by the sea names the fox and the sea, and does not repeat a sentence three times."""
    assert fox_by_the_sea().on_topic
    assert not fox_by_the_sea().repeats
