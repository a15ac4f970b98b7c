"""Stories: the facts of one story, and its text in one of three lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from tools.demo_model.templates import Block, capitalize_first, choose, expand, read_blocks, with_article
from tools.demo_model.world import (
    ADJECTIVES,
    COLORS,
    HEROES,
    MEN,
    MENS_NAMES,
    PLACES,
    THINGS,
    WOMEN,
    WOMENS_NAMES,
    Place,
    held_out,
)

PLOTS = read_blocks(Path(__file__).with_name("plots.txt"), "plot")
_TELLING = read_blocks(Path(__file__).with_name("moods.txt"), "mood")
MOODS = tuple(mood for mood in _TELLING if mood != "plain")
LENGTHS = ("short", "normal", "long")
MAX_WORDS = {"short": 75, "normal": 146, "long": 156}
"""A word is about 1.3 tokens, so even the longest story ends well within 256 tokens."""


@dataclass(frozen=True)
class Story:
    """The facts of a story; they stay the same when the story is told again, shorter, longer or continued."""

    hero: str
    adjective: str
    name: str
    female: bool
    friend: str
    friend_name: str
    friend_female: bool
    place: Place
    thing: str
    spot: str
    time: str
    plot: str
    mood: str

    def template_names(self) -> dict[str, str]:
        """Return the names that templates can use."""
        pronouns = _pronouns(self.female, "") | _pronouns(self.friend_female, "f")
        names = pronouns | {
            "hero": self.hero,
            "a_hero": with_article(f"{self.adjective} {self.hero}".strip()),
            "the_hero": f"the {self.hero}",
            "name": self.name,
            "names": f"{self.name}'s",
            "friend": self.friend,
            "a_friend": with_article(self.friend),
            "the_friend": f"the {self.friend}",
            "the_friends": f"the {self.friend}'s",
            "friend_name": self.friend_name,
            "a_friend2": "an old traveller",
            "friend2_pronoun": "the traveller",
            "where": self.place.phrase,
            "back": self.place.definite_phrase,
            "there": self.place.definite,
            "thing": self.thing,
            "a_thing": with_article(self.thing),
            "item": self.thing.split(maxsplit=1)[1],
            "spot": self.spot,
            "the_spot": "the " + self.spot.split(maxsplit=1)[1],
            "time": self.time,
        }
        return names | {capitalize_first(key): capitalize_first(value) for key, value in names.items()}


def _pronouns(female: bool, prefix: str) -> dict[str, str]:
    words = ("she", "her", "her", "herself") if female else ("he", "him", "his", "himself")
    return {prefix + key: word for key, word in zip(("he", "him", "his", "himself"), words, strict=True)}


def _is_female(noun: str, rng: Random) -> bool:
    return noun in WOMEN or (noun not in MEN and rng.random() < 0.5)


def random_pair(rng: Random) -> tuple[str, Place]:
    """Return a character and a place that training may combine."""
    while True:
        hero, place = rng.choice(HEROES), rng.choice(PLACES)
        if not held_out(hero, place):
            return hero, place


def random_story(rng: Random, hero: str = "", place: Place | None = None, plot: str = "", mood: str = "") -> Story:
    """Return a story with the given facts; the other facts are random."""
    drawn_hero, drawn_place = random_pair(rng)
    while held_out(hero or drawn_hero, place or drawn_place):
        drawn_hero, drawn_place = random_pair(rng)
    hero, place = hero or drawn_hero, place or drawn_place
    friend = rng.choice([noun for noun in HEROES if noun not in (hero, place.noun) and not held_out(noun, place)])
    female, friend_female = _is_female(hero, rng), _is_female(friend, rng)
    name = rng.choice(WOMENS_NAMES if female else MENS_NAMES)
    friends_names = [other for other in (WOMENS_NAMES if friend_female else MENS_NAMES) if other != name]
    return Story(
        hero=hero,
        adjective=rng.choice(ADJECTIVES) if rng.random() < 0.4 else "",
        name=name,
        female=female,
        friend=friend,
        friend_name=rng.choice(friends_names),
        friend_female=friend_female,
        place=place,
        thing=f"{rng.choice(COLORS)} {rng.choice(THINGS)}",
        spot=rng.choice(place.setting.spots),
        time=rng.choice(("morning", "evening", "day", "afternoon")),
        plot=plot or rng.choice(list(PLOTS)),
        mood=mood,
    )


def with_hero(story: Story, hero: str, rng: Random) -> Story:
    """Return the same story about another character, who gets a new name."""
    other = random_story(rng, hero, story.place)
    return replace(story, hero=hero, adjective="", name=other.name, female=other.female, friend=other.friend,
                   friend_name=other.friend_name, friend_female=other.friend_female)  # fmt: skip


def with_place(story: Story, place: Place, rng: Random) -> Story:
    """Return the same story at another place."""
    return replace(story, place=place, spot=rng.choice(place.setting.spots))


def tell(story: Story, length: str, rng: Random) -> str:
    """Return the text of the story in one paragraph."""
    while True:
        text = " ".join(_parts(story, length, rng))
        if len(text.split()) <= MAX_WORDS[length]:
            return _introduce(text, story)


def _parts(story: Story, length: str, rng: Random) -> Iterator[str]:
    block, telling, names = PLOTS[story.plot], _TELLING[story.mood or "plain"], story.template_names()
    yield choose(telling["opening"], rng, **names)
    if length == "long" or (length == "normal" and rng.random() < 0.4):
        yield choose(story.place.setting.scenes, rng, **names)
    beats = [block["brief"]] if length == "short" else _beats(block, length, rng)
    for index, lines in enumerate(beats):
        yield choose(lines, rng, **names)
        if index == 0 and story.mood and length != "short":
            yield choose(telling["line"], rng, **names)
    yield choose(telling["ending"], rng, **names)
    if rng.random() < {"short": 0.0, "normal": 0.3, "long": 0.7}[length]:
        yield choose(block["moral"], rng)


def _beats(block: Block, length: str, rng: Random) -> Iterator[list[str]]:
    """Yield the alternatives of each beat in order; optional beats (`4?`) are more frequent in a long story."""
    for key in dict.fromkeys(key.rstrip("?") for key in block if key[0].isdigit()):
        if key in block:
            yield block[key]
        if f"{key}?" in block and rng.random() < (0.6 if length == "long" else 0.25):
            yield block[f"{key}?"]


def _introduce(text: str, story: Story) -> str:
    """Introduce the friend at the first mention, and use "the" for the spot from the second mention on."""
    before, name, after = text.partition(story.friend_name)
    called = re.search(r'((called|named|I am|name was|only) |\?" ")$', before)
    known = called or re.match(rf",? the {story.friend}", after)
    if name and not known:
        text = f"{before}{name} the {story.friend}{after}"
    article, spot = story.spot.split(maxsplit=1)
    before, mention, after = text.partition(spot)
    return before + mention + after.replace(f"{article} {spot}", f"the {spot}")


def continuation(story: Story, rng: Random) -> str:
    """Return a continuation of the story."""
    return choose(PLOTS[story.plot]["next"], rng, **story.template_names())


def moral(story: Story, rng: Random) -> str:
    """Return a moral of the story."""
    return expand(rng.choice(PLOTS[story.plot]["moral"]), rng)
