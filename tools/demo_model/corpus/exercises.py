"""Exercises: requests to repeat words, and questions for the pronouns of names.

They are of little use in a chat, but they are the fastest way to learn copying and the gender of names.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tools.demo_model.corpus.names import REAL, TITLES, invented_name, invented_noun, real_name
from tools.demo_model.corpus.templates import expand
from tools.demo_model.corpus.world import (
    HEROES,
    MASS_THINGS,
    MEN,
    MORE_HEROES,
    MORE_THINGS,
    OTHER_THINGS,
    PEOPLE,
    PLURAL_THINGS,
    THINGS,
    WOMEN,
    unseen,
)

_GENDERED = {female: sorted({*nouns, *PEOPLE[female]}) for female, nouns in ((True, WOMEN), (False, MEN))}
_NOUNS = (*HEROES, *MORE_HEROES, *THINGS, *MORE_THINGS, *OTHER_THINGS, *PLURAL_THINGS, *MASS_THINGS)


def exercise(rng: Random) -> tuple[str, str]:
    """Return a question and its answer."""
    return _echo(rng) if rng.random() < 0.5 else _pronouns(rng)


def late_exercise(rng: Random) -> tuple[str, str]:
    """Return a question and its answer for the last part of the training: mostly the gender of names."""
    draw = rng.random()
    return _genders(rng) if draw < 0.5 else _possessives(rng) if draw < 0.72 else exercise(rng)


def last_exercise(rng: Random) -> tuple[str, str]:
    """Return a question and its answer for the end of the training: genders, and words that are easily mixed up."""
    return _mixed_up(rng) if rng.random() < 0.45 else late_exercise(rng)


def _mixed_up(rng: Random) -> tuple[str, str]:
    """Return a request to repeat words that share pieces, such as "Nestor, gorilla, Victilla"."""
    words = [_echoed(rng) for _ in range(rng.randrange(2, 5))]
    for _ in range(rng.randrange(2, 6)):
        first, second = rng.choice(words), rng.choice(words)
        spliced = first[: rng.randrange(1, len(first))] + second[rng.randrange(1, len(second)) :]
        if 3 <= len(spliced) <= 16 and spliced not in words and not unseen(spliced):
            words.append(spliced)
    rng.shuffle(words)
    answer = ", ".join(words)
    return expand(f"[Repeat|Say|Please repeat|Repeat after me|Say after me]: {answer}", rng), answer


def _genders(rng: Random) -> tuple[str, str]:
    """Return a question for the gender of 16 names; the answer says it before the name, as most openings do."""
    woman, man = rng.choice((("girl", "boy"), ("girl", "boy"), ("woman", "man"), ("princess", "prince")))
    called = rng.choice(("called", "named", "whom all called"))  # codespell:ignore whom
    people = _people(rng, _name, woman, man)
    answer = ", ".join(f"a {word} {called} {name}" for name, word in people)
    return _question(rng, f"{woman.capitalize()} or {man}, {called}", people), answer


def _possessives(rng: Random) -> tuple[str, str]:
    """Return a question for the thing of 16 people."""
    thing = rng.choice(_NOUNS)
    while unseen(thing):
        thing = rng.choice(_NOUNS)
    people = _people(rng, _name, "her", "his")
    answer = ", ".join(f"{name} and {pronoun} {thing}" for name, pronoun in people)
    return _question(rng, f"{rng.choice(('Whose', 'Her or his', 'His or her'))} {thing}", people), answer


def _name(rng: Random, female: bool) -> str:
    """Return a name, mostly a real one, each equally often; a title or an invented ending says the gender, too."""
    draw = rng.random()
    if draw < 0.92:
        return rng.choice(REAL[female])
    return f"{rng.choice(TITLES[female])} {rng.choice(REAL[female])}" if draw < 0.96 else invented_name(rng, female)


def _echo(rng: Random) -> tuple[str, str]:
    words = [_echoed(rng) for _ in range(rng.randrange(2, 12))]
    answer = ", ".join(words)
    if rng.random() < 0.25:
        names = [word[:1].upper() + word[1:] for word in words]
        question = f"{expand('[Names|Write the names|The names are]', rng)}: {answer.lower()}"
        return question, ", ".join(names)
    return expand(f"[Repeat|Say|Please repeat|Repeat after me|Say after me]: {answer}", rng), answer


def _echoed(rng: Random) -> str:
    draw, female = rng.random(), rng.random() < 0.5
    if draw < 0.35:
        return real_name(rng, female)
    if draw < 0.6:
        return invented_name(rng, female)
    word = invented_noun(rng) if draw < 0.75 else rng.choice(_NOUNS)
    return word if not unseen(word) else _echoed(rng)


def _pronouns(rng: Random) -> tuple[str, str]:
    """Return a question for the pronouns of 16 names; it teaches as many genders as 16 stories."""
    people = _people(rng, _person, "she", "he")
    answer = ", ".join(f"{name} {pronoun}" for name, pronoun in people)
    return _question(rng, rng.choice(("He or she", "She or he", "Pronouns")), people), answer


def _people(rng: Random, draw: Callable[[Random, bool], str], her_word: str, his_word: str) -> list[tuple[str, str]]:
    """Draw 16 names, each with the word of its gender."""
    return [(draw(rng, female), her_word if female else his_word) for female in rng.choices((True, False), k=16)]


def _question(rng: Random, asked: str, people: list[tuple[str, str]]) -> str:
    """Return a question about the names, sometimes without capitals."""
    question = f"{asked}: {', '.join(name for name, _ in people)}"
    return question.lower() if rng.random() < 0.15 else question


def _person(rng: Random, female: bool) -> str:
    """Return a name, each equally often, or words that say the gender, such as "the queen" or "Sir Ida"."""
    draw = rng.random()
    if draw < 0.84:
        return rng.choice(REAL[female])
    if draw < 0.92:
        name = rng.choice(REAL[rng.random() < 0.5]) if draw < 0.88 else invented_name(rng, female)
        return f"{rng.choice(TITLES[female])} {name}"
    return f"{rng.choice(('the', 'my', 'a'))} {rng.choice(_GENDERED[female])}"
