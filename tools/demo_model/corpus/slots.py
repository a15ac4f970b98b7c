"""Words for the placeholders of a request: characters, relations, places, things and fillers."""

from __future__ import annotations

from random import Random

from tools.demo_model.corpus.names import invented_noun
from tools.demo_model.corpus.stories import Thing
from tools.demo_model.corpus.templates import capitalize_first, with_article
from tools.demo_model.corpus.world import (
    ANIMALS,
    COLORS,
    HEADLINES,
    HEROES,
    MASS_THINGS,
    MENS_RELATIONS,
    MENS_RELATIVES,
    MONTHS,
    MORE_HEROES,
    MORE_PLACES,
    MORE_THINGS,
    NUMBERS,
    OTHER_THINGS,
    PEOPLE,
    PETS,
    PLACES,
    PLURAL_THINGS,
    PREDICATES,
    SETTINGS,
    THING_ADJECTIVES,
    THINGS,
    VERBS,
    WEEKDAYS,
    WOMENS_RELATIONS,
    WOMENS_RELATIVES,
    Place,
    is_female,
    place,
    unseen,
)

_SOME = {*PLURAL_THINGS, *MASS_THINGS}
_CHILD = {True: "girl", False: "boy"}
_ADULT = {True: "woman", False: "man"}
_RELATIONS = {True: (WOMENS_RELATIONS, WOMENS_RELATIVES), False: (MENS_RELATIONS, MENS_RELATIVES)}


def fillers(rng: Random) -> dict[str, str]:
    """Return the words of placeholders that the story does not repeat."""
    return {
        "verbs": rng.choice(VERBS),
        "predicate": rng.choice(PREDICATES),
        "a_hero2": with_article(rng.choice(HEROES if rng.random() < 0.6 else MORE_HEROES)),
        "headline": rng.choice(HEADLINES),
        "weekday": rng.choice(WEEKDAYS),
        "month": rng.choice(MONTHS),
    }


def requested_character(slots: set[str], asks_hero: bool, rng: Random) -> tuple[str, bool, dict[str, str]]:
    """Return the character, empty if the request says none, the gender, and the words of the relations."""
    female = rng.random() < 0.5
    if "girl" in slots or "boy" in slots:
        female = "girl" in slots
        adult = rng.random() < 0.25
        words = {_CHILD[female]: rng.choice(_RELATIONS[female][adult])}
        return _hero_of_gender(female, rng) if asks_hero else (_ADULT if adult else _CHILD)[female], female, words
    if "person" in slots or "a_person" in slots:
        noun = rng.choice(PEOPLE[female])
        return noun, female, {"person": noun, "a_person": with_article(noun)}
    if "pet" in slots:
        pet = rng.choice(PETS)
        return pet, is_female(pet, rng), {"pet": pet}
    if asks_hero:
        hero = requested_hero(rng)
        return hero, is_female(hero, rng), {}
    return "", female, {}


def _hero_of_gender(female: bool, rng: Random) -> str:
    while True:
        hero = requested_hero(rng)
        if is_female(hero, rng) == female:
            return hero


def requested_hero(rng: Random) -> str:
    """Return a character: one of the stories, another one, a thing or an invented word."""
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(HEROES)
    noun = rng.choice(MORE_HEROES if draw < 0.83 else MORE_THINGS) if draw < 0.88 else invented_noun(rng)
    return noun if not unseen(noun) else requested_hero(rng)


def unnamed_hero(female: bool, rng: Random) -> str:
    """Return the character of a story whose request only has a name."""
    while True:
        hero = rng.choice(((_CHILD[female],), PEOPLE[female], HEROES)[rng.choices((0, 1, 2), (0.4, 0.35, 0.25))[0]])
        if is_female(hero, rng) == female:
            return hero


def requested_place(rng: Random) -> Place:
    """Return a place: one of the stories, another one, or one with an invented word."""
    draw, setting = rng.random(), rng.choice(list(SETTINGS.values()))
    if draw < 0.62:
        return rng.choice(PLACES)
    if draw < 0.86:
        return place(rng.choice(MORE_PLACES), setting)
    word = invented_noun(rng)
    phrase = rng.choice(
        ("in {}", "in a {}", "on a {}", "at the {}", "by a {}", "in the land of {}", "on the planet {}")
    )
    proper = phrase.split("{")[0].split()[-1] in {"in", "of", "planet"}
    return place(phrase.format(capitalize_first(word) if proper else word), setting)


def requested_thing(rng: Random) -> Thing:
    """Return a thing or an animal: one, several or some of it; half of them have an adjective."""
    draw = rng.random()
    if draw < 0.12:
        return _several(rng)
    adjective = rng.choice(THING_ADJECTIVES if rng.random() < 0.8 else COLORS) if rng.random() < 0.45 else ""
    if draw < 0.2:
        noun = rng.choice(MASS_THINGS)
        return Thing(adjective, noun, plural=True) if not unseen(noun) else requested_thing(rng)
    nouns = rng.choices((THINGS, MORE_THINGS, OTHER_THINGS, ANIMALS), (0.12, 0.55, 0.23, 0.1))[0]
    noun = rng.choice(nouns) if draw < 0.87 else invented_noun(rng)
    return Thing(adjective, noun, plural=noun in _SOME) if not unseen(noun) else requested_thing(rng)


def compound_thing(rng: Random) -> Thing:
    """Return a thing with a name of two nouns that are seldom together, such as "owl lamp"."""
    first, second = (rng.choice(rng.choice((THINGS, MORE_THINGS, ANIMALS))) for _ in range(2))
    noun = f"{first} {second}"
    adjective = rng.choice(THING_ADJECTIVES) if rng.random() < 0.2 else ""
    if noun.count(" ") > 1 or any(map(unseen, (first, second, noun))):
        return compound_thing(rng)
    return Thing(adjective, noun)


def _several(rng: Random) -> Thing:
    """Return several things, such as "some gloves", "red gloves" with "some", or "seventeen clocks"."""
    noun = rng.choice(PLURAL_THINGS)
    if rng.random() < 0.35:
        singular = rng.choice((*THINGS, *MORE_THINGS))
        noun = f"{singular}s" if singular[-1] not in "shxyz" and not singular.endswith(("fe", "lf")) else noun
    if unseen(noun) or unseen(noun.removesuffix("s")):
        return _several(rng)
    adjective = rng.choice(rng.choice((NUMBERS, THING_ADJECTIVES, COLORS))) if rng.random() < 0.6 else ""
    return Thing(adjective, noun, plural=True)
