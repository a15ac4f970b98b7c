"""Names and nouns that the stories do not know: real first names, and invented words.

With them the model learns to copy words instead of knowing them all.
"""

from __future__ import annotations

from random import Random

from tools.demo_model.corpus.templates import capitalize_first, read_blocks
from tools.demo_model.corpus.world import MENS_NAMES, WOMENS_NAMES, unseen

_LISTS = read_blocks("words", "names.txt", "names_more.txt")
_SOUNDS = read_blocks("words", "world.txt")


def _names(title: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for line in _LISTS[title]["+"] for name in line.split()))


REAL = {True: _names("women"), False: _names("men")}
"""Names by gender (True for women), most frequent first, then the names of other countries."""
RARE = {True: _names("rare_women"), False: _names("rare_men")}
"""Real names that only the evaluation uses."""
_RARE_NAMES = {*RARE[True], *RARE[False]}

_WEIGHTS = {female: [(rank + 20) ** -0.4 for rank in range(len(names))] for female, names in REAL.items()}
TITLES = {True: _names("womens_titles"), False: _names("mens_titles")}
_NEUTRAL_TITLES = _names("titles")
_ACCENTED = {"e": "éèë", "o": "öøó", "a": "áåä", "u": "üú", "n": "ñ", "i": "íï", "c": "ç"}


def real_name(rng: Random, female: bool) -> str:
    """Return a first name from the lists, the frequent ones more often."""
    names = REAL[female]
    return rng.choices(names, _WEIGHTS[female])[0] if rng.random() < 0.7 else rng.choice(names)


def known_name(rng: Random, female: bool) -> str:
    """Return one of the few names that characters get if a request names none."""
    return rng.choice(WOMENS_NAMES if female else MENS_NAMES)


def invented_word(rng: Random) -> str:
    """Return a new word in lower case, such as "splorbin"."""
    while True:
        word = (_syllables if rng.random() < 0.6 else _spliced)(rng)
        if 3 <= len(word) <= 13:
            return word


def invented_noun(rng: Random) -> str:
    """Return a new word in lower case that is never one of the evaluation."""
    while True:
        word = invented_word(rng)
        if not unseen(word):
            return word


def invented_name(rng: Random, female: bool) -> str:
    """Return a new name, such as "Velorina" or "Brombold"; its ending often tells the gender."""
    word = invented_noun(rng)
    if rng.random() < 0.5:
        endings = ("a", "ia", "elle", "ina", "ette") if female else ("o", "us", "bert", "old", "ric")
        word = word.rstrip("aeiou") + rng.choice(endings)
    name = capitalize_first(word)
    return name if not unseen(word) and name not in _RARE_NAMES else invented_name(rng, female)


def special_name(rng: Random, female: bool) -> str:
    """Return a name in an unusual form: with a title, two words, an accent, a hyphen or a digit."""
    name = real_name(rng, female) if rng.random() < 0.6 else invented_name(rng, female)
    draw = rng.random()
    if draw < 0.45:
        return f"{rng.choice(_NEUTRAL_TITLES if rng.random() < 0.35 else TITLES[female])} {name}"
    if draw < 0.6:
        return f"{name} {real_name(rng, female)}"
    if draw < 0.7:
        return f"{name}-{real_name(rng, female)}"
    if draw < 0.9:
        places = [index for index, letter in enumerate(name) if letter in _ACCENTED]
        if places:
            index = rng.choice(places)
            return name[:index] + rng.choice(_ACCENTED[name[index]]) + name[index + 1 :]
    letters = "".join(rng.choice("ABCDEFGHKLMNPQRSTUVXYZ") for _ in range(rng.randrange(1, 3)))
    return f"{letters}{rng.choice(('-', '', ' '))}{rng.randrange(2, 100)}"


def requested_name(rng: Random, female: bool) -> str:
    """Return a name as a request may have it: known, real, invented or special."""
    (draw,) = rng.choices((known_name, real_name, invented_name, special_name), (0.08, 0.52, 0.28, 0.12))
    name: str = draw(rng, female)
    return name


def _syllables(rng: Random) -> str:
    onsets, vowels, codas = (_SOUNDS[title]["+"][0].split() for title in ("onsets", "vowels", "codas"))
    parts = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        parts += [rng.choice(onsets), rng.choice(vowels)]
        if rng.random() < 0.25:
            parts.append(rng.choice(("n", "r", "l", "s", "m", "t", "k", "b", "d", "g", "f", "p", "z", "x")))
    return "".join(parts) + rng.choice(("", "", *codas))


def _spliced(rng: Random) -> str:
    """Return the beginning of one name and the end of another one."""
    first, second = real_name(rng, rng.random() < 0.5).lower(), real_name(rng, rng.random() < 0.5).lower()
    return first[: rng.randrange(2, max(3, len(first)))] + second[-rng.randrange(2, max(3, len(second))) :]
