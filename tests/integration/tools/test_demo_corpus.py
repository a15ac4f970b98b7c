"""The training text of the demo model, in a sample that takes seconds to generate."""

import itertools
import re
from functools import cache

import pytest
from tools.demo_model.grammar import Message, conversations
from tools.demo_model.world import PLACES, held_out


@cache
def corpus() -> list[list[Message]]:
    """Return four thousand conversations of the training grammar."""
    return list(itertools.islice(conversations(12), 4000))


@pytest.mark.parametrize("hero", ["fox", "owl", "robot"])
def test_held_out_pairs_are_never_in_the_text(hero: str) -> None:
    """No story combines a character and a place that are held out for the evaluation."""
    phrases = "|".join(re.escape(place.phrase) for place in PLACES if held_out(hero, place))
    story = re.compile(rf"\b{hero}\b[^.]*? (?:who )?lived (?:{phrases})\b[,.]")
    opening = re.compile(rf"once an? (?:\w+ )?{hero} (?:{phrases}),")
    for messages in corpus():
        for message in messages:
            assert not story.search(message["content"])
            assert not opening.search(message["content"])
