"""The nouns of the stories: characters, places and things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from zlib import crc32

from tools.demo_model.templates import read_blocks

_BLOCKS = read_blocks(Path(__file__).with_name("world.txt"), "words")


def _words(title: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for line in _BLOCKS[title]["+"] for word in line.split())


HEROES = (*_words("animals"), *_words("people"), *_words("creatures"), *_words("machines"))
WOMEN, MEN = _words("female"), _words("male")
WOMENS_NAMES, MENS_NAMES = _words("womens_names"), _words("mens_names")
ADJECTIVES, THINGS, COLORS = _words("adjectives"), _words("things"), _words("colors")


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
        return f"{self.phrase.split()[0]} {self.definite}"


def _place(kind: str, phrase: str) -> Place:
    words = phrase.split()
    proper = words[1] not in {"a", "an", "the"}
    noun = " ".join(words[1:] if proper else words[2:])
    return Place(phrase, noun, noun if proper else f"the {noun}", SETTINGS[kind])


PLACES = tuple(_place(kind, phrase) for kind in SETTINGS for line in _BLOCKS[kind]["at"] for phrase in line.split("; "))


def held_out(hero: str, place: Place) -> bool:
    """Return True for about one pair in eight; these pairs are for the evaluation and never occur in training texts."""
    return (hero, place.noun) == ("fox", "sea") or crc32(f"{hero}|{place.noun}".encode()) % 8 == 0


def invented_word(rng: Random) -> str:
    """Return a new word, so that the model learns to copy words instead of knowing them all."""
    onsets, vowels, codas = _words("onsets"), _words("vowels"), _words("codas")
    syllables = rng.choice((1, 2, 2, 3))
    stem = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(syllables))
    return stem + rng.choice(("", "", *codas))


def invented_place(rng: Random) -> Place:
    """Return a place with an invented name."""
    noun = invented_word(rng)
    preposition = rng.choice(("in", "on", "at", "by"))
    return Place(f"{preposition} a {noun}", noun, f"the {noun}", rng.choice(list(SETTINGS.values())))
