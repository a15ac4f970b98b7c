"""The nouns of the stories: characters, places, things, wishes and topics."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from zlib import crc32

from tools.demo_model.corpus.templates import read_blocks

_BLOCKS = read_blocks("words", "world.txt")
_EVALUATED = read_blocks("words", "nouns.txt")
_MORE = read_blocks("words", "nouns.txt", "nouns_more.txt")
_OTHER = read_blocks("words", "nouns_more.txt")
_LISTS = read_blocks("list", "nouns.txt", "nouns_more.txt")


def _words(blocks: dict[str, dict[str, list[str]]], *titles: str) -> tuple[str, ...]:
    lines = (line for title in titles for line in blocks[title]["+"])
    return tuple(dict.fromkeys(word.replace("_", " ") for line in lines for word in line.split()))


def _list(title: str) -> tuple[str, ...]:
    return tuple(item for line in _LISTS[title]["+"] for item in line.split("; "))


ANIMALS = (*_words(_BLOCKS, "animals"), *_words(_MORE, "animals"))
HEROES = _words(_BLOCKS, "animals", "people", "creatures", "machines")
MORE_HEROES = _words(_MORE, "animals", "people", "creatures", "objects")
WOMEN = {*_words(_BLOCKS, "female"), *_words(_MORE, "female")}
MEN = {*_words(_BLOCKS, "male"), *_words(_MORE, "male")}
WOMENS_NAMES, MENS_NAMES = _words(_BLOCKS, "womens_names"), _words(_BLOCKS, "mens_names")
ADJECTIVES, THINGS, COLORS = (_words(_BLOCKS, title) for title in ("adjectives", "things", "colors"))
MORE_ADJECTIVES, THING_ADJECTIVES = (_words(_MORE, title) for title in ("moods", "adjectives"))
MORE_THINGS, OTHER_THINGS = _words(_EVALUATED, "things"), _words(_OTHER, "things")
"""Things that requests name; the evaluation takes its unseen ones from the first of these lists."""
PLURAL_THINGS, MASS_THINGS = (_words(_OTHER, title) for title in ("plural_things", "mass_things"))
NUMBERS, UNIQUE = _words(_OTHER, "numbers"), _words(_OTHER, "unique")
"""Words before a thing that need no article, or "the"."""
WEEKDAYS, MONTHS, HEADLINES = _words(_OTHER, "weekdays"), _words(_OTHER, "months"), _list("headlines")
WOMENS_RELATIONS, MENS_RELATIONS = _words(_MORE, "womens_relations"), _words(_MORE, "mens_relations")
WOMENS_RELATIVES, MENS_RELATIVES = _words(_OTHER, "womens_relatives"), _words(_OTHER, "mens_relatives")
PEOPLE = {True: _words(_OTHER, "women"), False: _words(_OTHER, "men")}
"""Words for a person by gender, True for women."""
PETS = _words(_MORE, "pets", "more_pets")
WISHES, TOPICS, VERBS, PREDICATES = (_list(title) for title in ("wishes", "topics", "verbs", "predicates"))


@dataclass(frozen=True)
class Setting:
    """A kind of place: its spots, where things can happen, and its scenes, which describe it."""

    spots: tuple[str, ...]
    scenes: tuple[str, ...]


SETTINGS = {
    title: Setting(tuple(block["spot"]), tuple(block["scene"])) for title, block in _BLOCKS.items() if "at" in block
}


@dataclass(frozen=True)
class Place:
    """The place of a story: `phrase` is "by the sea", `noun` is "sea", `definite` is "the sea"."""

    phrase: str
    noun: str
    definite: str
    setting: Setting

    @property
    def definite_phrase(self) -> str:
        """The phrase for a place that is already known: "in a castle" becomes "in the castle"."""
        before = self.phrase[: self.phrase.rindex(self.noun)].split()
        return " ".join([*(word for word in before if word not in {"a", "an", "the"}), self.definite])


def place(phrase: str, setting: Setting) -> Place:
    """Return the place of a phrase, such as "in a castle", "on Mars" or "at the edge of the forest"."""
    words = phrase.split()
    article = next((index for index, word in enumerate(words) if word in {"a", "an", "the"}), 0)
    noun = " ".join(words[article + 1 :])
    return Place(phrase, noun, f"the {noun}" if article else noun, setting)


PLACES = tuple(
    place(phrase, SETTINGS[kind]) for kind in SETTINGS for line in _BLOCKS[kind]["at"] for phrase in line.split("; ")
)
MORE_PLACES = _list("places")


def held_out(hero: str, place: Place) -> bool:
    """Return True for about one pair in eight; these pairs are for the evaluation and never occur in training texts."""
    return (hero, place.noun) == ("fox", "sea") or crc32(f"{hero}|{place.noun}".encode()) % 8 == 0


def unseen(word: str) -> bool:
    """Return True for about one name or thing in eight, which only the evaluation uses."""
    return crc32(f"unseen {word.lower()}".encode()) % 8 == 0


def is_female(noun: str, rng: Random) -> bool:
    """Return the gender of a character; a noun without a gender gets a random one."""
    return noun in WOMEN or (noun not in MEN and rng.random() < 0.5)
