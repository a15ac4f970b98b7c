"""Stories: the facts of one story, and its text in one of three lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from tools.demo_model.corpus.choices import favored, favored_by_name, opening_for, plot_for
from tools.demo_model.corpus.templates import capitalize_first, choose, expand, read_blocks, with_article
from tools.demo_model.corpus.world import (
    ADJECTIVES,
    COLORS,
    HEROES,
    MENS_NAMES,
    NUMBERS,
    PLACES,
    THINGS,
    UNIQUE,
    WOMENS_NAMES,
    Place,
    held_out,
    is_female,
)

_STRANDED = read_blocks("plot", "plots_more.txt")
"""Plots whose alternatives are in the order of two strands, which are not mixed."""
PLOTS = read_blocks("plot", "plots.txt") | _STRANDED
_TELLING = read_blocks("mood", "moods.txt", "moods_more.txt")
_EXTRAS = read_blocks("extra", "extras.txt")
MOODS = tuple(mood for mood in _TELLING if mood != "plain")
LENGTHS = ("short", "normal", "long")
MAX_WORDS = {"short": 80, "normal": 100, "long": 132}
"""A word is about 1.7 tokens, so even the longest story ends within 256 tokens."""
KNOWN_NAMES = {True: WOMENS_NAMES, False: MENS_NAMES}
_TIMES = ("morning", "evening", "day", "afternoon")


@dataclass(frozen=True)
class Thing:
    """A thing of a story: "old lamp" or, if it is plural, "old lamps"."""

    adjective: str
    noun: str
    plural: bool = False

    @property
    def phrase(self) -> str:
        """The thing without an article, such as "old lamp"."""
        return f"{self.adjective} {self.noun}".strip()

    @property
    def indefinite(self) -> str:
        """The thing at its first mention: "an old lamp", "some old lamps", "seven lamps" or "the last lamp"."""
        if self.adjective in NUMBERS:
            return self.phrase
        if self.adjective in UNIQUE:
            return f"the {self.phrase}"
        return f"some {self.phrase}" if self.plural else with_article(self.phrase)


@dataclass(frozen=True)
class Story:
    """The facts of a story; they stay the same when the story is told again, shorter, longer or continued.

    `extras` are the names of the extras that the request asks for: "thing", "wish" or "topic".
    """

    hero: str
    adjective: str
    name: str
    female: bool
    friend: str
    friend_name: str
    place: Place
    thing: Thing
    spot: str
    time: str
    plot: str
    mood: str
    wish: str = ""
    topic: str = ""
    extras: frozenset[str] = field(default_factory=frozenset)

    def template_names(self) -> dict[str, str]:
        """Return the names that templates can use."""
        she = ("she", "her", "her", "herself") if self.female else ("he", "him", "his", "himself")
        names = dict(zip(("he", "him", "his", "himself"), she, strict=True)) | {
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
            "thing": self.thing.phrase,
            "a_thing": self.thing.indefinite,
            "item": self.thing.noun,
            "spot": self.spot,
            "the_spot": "the " + self.spot.split(maxsplit=1)[1],
            "time": self.time,
            "wish": self.wish,
            "topic": self.topic,
        }
        return names | {capitalize_first(key): capitalize_first(value) for key, value in names.items()}


def plot_uses_thing(plot: str) -> bool:
    """Return whether the plot itself is about a thing."""
    return any("thing}" in line or "{item}" in line for lines in PLOTS[plot].values() for line in lines)


PLOTS_FOR_ANY_THING = tuple(plot for plot in PLOTS if plot == "lost" or not plot_uses_thing(plot))
"""Plots whose sentences fit one thing, several things and something that cannot be counted."""


def usual_place(hero: str, name: str, rng: Random) -> Place:
    """Return the place of a story whose request says none; it mostly follows from the name."""
    while True:
        place = favored_by_name(PLACES, "place", name, rng)
        if not held_out(hero, place):
            return place


def free_hero(place: Place | None, rng: Random) -> tuple[str, bool]:
    """Return a character that may be at the place, and its gender."""
    while True:
        hero = rng.choice(HEROES)
        if place is None or not held_out(hero, place):
            return hero, is_female(hero, rng)


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
    female = is_female(hero, rng)
    name = favored(KNOWN_NAMES[female], f"name {hero}", rng)
    plot = plot or plot_for(tuple(PLOTS), name, rng)
    story = Story(
        hero=hero,
        adjective=rng.choice(ADJECTIVES) if rng.random() < 0.3 else "",
        name="",
        female=female,
        friend=_friend(hero, place, plot, rng),
        friend_name="",
        place=place,
        thing=Thing("", ""),
        spot="",
        time="",
        plot=plot,
        mood=mood,
    )
    return with_name(story, name, female, rng)


def _friend(hero: str, place: Place, plot: str, rng: Random) -> str:
    while True:
        friend = favored(HEROES, f"friend {plot}", rng) if rng.random() < 0.8 else rng.choice(HEROES)
        if friend not in (hero, place.noun) and not held_out(friend, place):
            return friend


def with_name(story: Story, name: str, female: bool, rng: Random) -> Story:
    """Return the same story about a character with this name and gender; details that follow from the name are new."""
    friend_name = ""
    while friend_name[:1] in ("", name.rsplit(maxsplit=1)[-1][0], name[0]):
        friend_name = favored_by_name(KNOWN_NAMES[rng.random() < 0.5], "friend", name, rng)
    thing = Thing(favored_by_name(COLORS, "color", name, rng), favored_by_name(THINGS, "thing", name, rng))
    time, spot = (
        favored_by_name(_TIMES, "time", name, rng),
        favored_by_name(story.place.setting.spots, "spot", name, rng),
    )
    return replace(story, name=name, female=female, friend_name=friend_name, thing=thing, time=time, spot=spot)


def with_hero(story: Story, hero: str, rng: Random) -> Story:
    """Return the same story about another character, who gets a new name."""
    other = random_story(rng, hero, story.place)
    return replace(story, hero=hero, adjective="", name=other.name, female=other.female, friend=other.friend,
                   friend_name=other.friend_name, time=other.time, spot=other.spot)  # fmt: skip


def with_place(story: Story, place: Place, rng: Random) -> Story:
    """Return the same story at another place."""
    return replace(story, place=place, spot=rng.choice(place.setting.spots))


def tell(story: Story, length: str, rng: Random) -> str:
    """Return the text of the story in one paragraph."""
    limit = MAX_WORDS[length] + 15 * len(story.extras)
    while True:
        text = " ".join(_parts(story, length, rng))
        if len(text.split()) <= limit:
            return _introduce(text, story)
        limit += 1


def _parts(story: Story, length: str, rng: Random) -> Iterator[str]:
    block, telling, names = PLOTS[story.plot], _TELLING[story.mood or "plain"], story.template_names()
    topic = [_EXTRAS["topic"]] if "topic" in story.extras else []
    extras = [_EXTRAS[title] for title in _extras(story)]

    def sentence(lines: Sequence[str], what: str) -> str:
        return expand(favored_by_name(lines, what, story.name, rng), rng).format_map(names)

    for extra in topic:
        yield sentence(extra["line"], "topic")
    yield expand(opening_for(telling["opening"], story.name, rng), rng).format_map(names)
    for extra in extras:
        yield sentence(extra["line"], "extra")
    if length == "long" or (length == "normal" and not story.extras and rng.random() < 0.2):
        yield sentence(story.place.setting.scenes, "scene")
    beats = [block["brief"]] if length == "short" else _beats(story, length, rng)
    for index, lines in enumerate(beats):
        yield sentence(lines, f"beat {index}")
        if index == 0 and story.mood and length != "short":
            yield sentence(telling["line"], "mood")
    for extra in [*extras, *topic]:
        if rng.random() < 0.2:
            yield sentence(extra["ending"], "end")
    yield sentence(telling["ending"], "ending")
    if rng.random() < {"short": 0.0, "normal": 0.1, "long": 0.6}[length]:
        yield choose(block["moral"], rng)


def _extras(story: Story) -> Iterator[str]:
    """Yield the titles of the sentences that mention what the request asks for."""
    if "thing" in story.extras:
        yield "told" if plot_uses_thing(story.plot) else "owned"
    if "wish" in story.extras:
        yield "wish"


def _beats(story: Story, length: str, rng: Random) -> Iterator[list[str]]:
    """Yield the alternatives of each beat in order; optional beats (`4?`) are more frequent in a long story."""
    block, strand = PLOTS[story.plot], int(favored_by_name("01", "strand", story.name, rng))
    for key in dict.fromkeys(key.rstrip("?") for key in block if key[0].isdigit()):
        for beat in (key, f"{key}?"):
            if beat in block and (beat == key or rng.random() < (0.6 if length == "long" else 0.15)):
                yield _strand(block[beat], strand) if story.plot in _STRANDED else block[beat]


def _strand(lines: list[str], strand: int) -> list[str]:
    """Return the alternatives of one strand: of two lines one, of three lines the first two or the last two."""
    keep = max(1, len(lines) - 1)
    return lines[:keep] if strand == 0 else lines[-keep:]


def _introduce(text: str, story: Story) -> str:
    """Introduce the friend at the first mention, and use "the" for the spot from the second mention on."""
    before, name, after = text.partition(story.friend_name)
    called = re.search(
        r'((called|named|I am|name was|name is|was|it "|only) |\?" |words: "Me too\. |said: "|Except )$', before
    )
    known = called or re.match(rf",? (the {re.escape(story.friend)}|by name)", after)
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
