"""Requests for a story, phrased as users type them."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tools.demo_model.stories import PLOTS, Story
from tools.demo_model.templates import capitalize_first, choose, read_blocks, with_article

PHRASES = {
    title: block["+"] for title, block in read_blocks(Path(__file__).with_name("requests.txt"), "phrase").items()
}


def _kind(story: Story, length: str, rng: Random) -> str:
    """Return a kind of story, such as "a short funny story"."""
    words = [rng.choice(PHRASES.get(kind, [""])) for kind in (length, story.mood, "story")]
    return with_article(" ".join(word for word in words if word))


def _names(story: Story, length: str, rng: Random) -> dict[str, str]:
    names = story.template_names()
    names["kind"] = _kind(story, length, rng)
    names["noun"] = names["place_noun"] = story.place.noun
    names["does"] = PLOTS[story.plot]["does"][0]
    return names


def ask_for_both(story: Story, length: str, rng: Random) -> str:
    """Return a request that names the character and the place."""
    names = _names(story, length, rng)
    if rng.random() < 0.2 and length == "normal" and not story.mood:
        return choose(PHRASES["loose"], rng, **names)
    return choose(PHRASES["about"], rng, **names | {"what": choose(PHRASES["both"], rng, **names)})


def ask_for_one(story: Story, length: str, rng: Random) -> str:
    """Return a request that names the character, the place or the subject."""
    names = _names(story, length, rng)
    topics = PLOTS[story.plot]["topic"][0].split("; ")
    what = choose(rng.choice((PHRASES["hero"], PHRASES["hero"], PHRASES["place"], topics)), rng, **names)
    return choose(PHRASES["about"], rng, **names | {"what": what})


def ask_for_any(story: Story, length: str, rng: Random) -> str:
    """Return a request that names neither character nor place nor subject."""
    return choose(PHRASES["open"], rng, **_names(story, length, rng))


def as_typed(text: str, rng: Random) -> str:
    """Return the request as users type it: with or without capitals, "please" and a full stop."""
    if rng.random() < 0.12 and "please" not in text.lower():
        text += rng.choice((" please", ", please"))
    elif rng.random() < 0.04:
        text = rng.choice(("Hi, ", "Hello! ", "Please ", "OK, ")) + text
    draw = rng.random()
    if draw < 0.2:
        return text.lower()
    text = capitalize_first(text)
    question = text.split()[0] in {"Can", "Could", "Would", "Do", "What", "Who", "How", "Is", "Are", "Which", "Where"}
    end = "?" if question else rng.choice(("", ".", ".", "!"))
    return text if draw < 0.4 or text[-1] in ".!?" else text + end
