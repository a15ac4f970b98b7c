"""The prompts of the evaluation: half are written freely, half are made of words that training never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from tools.demo_model.corpus.names import RARE, REAL, invented_word
from tools.demo_model.corpus.templates import capitalize_first, read_blocks, with_article
from tools.demo_model.corpus.world import (
    HEROES,
    MENS_NAMES,
    MORE_THINGS,
    PLACES,
    THINGS,
    WOMENS_NAMES,
    held_out,
    is_female,
    unseen,
)

PARTS = ("tuning", "final")
"""The prompts to look at while the training text is written, and the prompts for one run at the end."""
PROMPTS_PER_KIND = 250
ANY = "any"

_PHRASINGS = read_blocks("made", "../prompts_made.txt")["prompt"]["+"]


@dataclass(frozen=True)
class Prompt:
    """A request with its labels; `name` and `thing` are empty if the story is free to choose.

    `pronoun` is the gender that the prompt determines, or "any". `listed` is true for a name in the lists of real
    names, false for another one.
    """

    text: str
    name: str
    pronoun: str
    thing: str
    listed: bool


def prompts(part: str) -> list[Prompt]:
    """Return the written and the made prompts of a part."""
    return [*written(part), *made(part)]


def written(part: str) -> list[Prompt]:
    """Return the prompts of a file with lines of the form `request | name | pronoun | thing`."""
    path = Path(__file__).with_name(f"prompts_{part}.txt")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    fields = ([field.strip() for field in line.split("|")] for line in lines)
    return [
        Prompt(text, name.strip("-"), pronoun, thing.strip("-"), name in _LISTED)
        for text, name, pronoun, thing in fields
    ]


_LISTED = {*WOMENS_NAMES, *MENS_NAMES, *(name for names in REAL.values() for name in names)}


def made(part: str) -> list[Prompt]:
    """Return requests with unseen names, unseen things and held-out pairs of character and place."""
    rng = Random(f"prompts {part}")
    return [_made(_PHRASINGS[index % len(_PHRASINGS)], index % 2 == 0, rng) for index in range(PROMPTS_PER_KIND)]


def _made(phrasing: str, listed: bool, rng: Random) -> Prompt:
    place = rng.choice(PLACES)
    hero = rng.choice([hero for hero in HEROES if held_out(hero, place)])
    female = is_female(hero, rng) if "hero}" in phrasing else rng.random() < 0.5
    if listed:
        name = rng.choice(RARE[female])
    else:
        name = capitalize_first(next(word for word in iter(lambda: invented_word(rng), "") if unseen(word)))
    thing = rng.choice([noun for noun in (*THINGS, *MORE_THINGS) if unseen(noun)])
    she = ("she", "her", "her") if female else ("he", "him", "his")
    names = dict(zip(("he", "him", "his"), she, strict=True)) | {
        "hero": hero,
        "a_hero": with_article(hero),
        "name": name,
        "where": place.phrase,
        "thing": thing,
        "a_thing": with_article(thing),
    }
    text = phrasing.format_map(names | {capitalize_first(key): capitalize_first(names[key]) for key in names})
    said = any(f"{{{key}}}" in phrasing.lower() for key in ("he", "him", "his"))
    return Prompt(text, name, she[0] if said else ANY, thing if "thing}" in phrasing else "", listed)
