"""Choices that mostly follow from the facts of a story, so that other facts give another story.

A model that always takes the likeliest continuation then tells different stories to different requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from hashlib import blake2b
from random import Random
from typing import TypeVar

_FAVORED = 0.75
"""Share of the choices that follow from the facts."""
_Option = TypeVar("_Option")
_STYLES = 24
_PLOTS_PER_STYLE = 4
_one_letter = False


@contextmanager
def by_one_letter(enabled: bool) -> Iterator[None]:
    """Let each choice follow from one letter of the name, the first or the last, instead of from the first two.

    A model with pieces of words learns these keys far better: without them it did not learn which of 24 openings
    belongs to which name, and told a quarter of the greedy stories with the same one.
    """
    global _one_letter  # noqa: PLW0603 (the choices are in every corner of the grammar, which passes only `rng` on)
    before, _one_letter = _one_letter, enabled
    try:
        yield
    finally:
        _one_letter = before


def favored(options: Sequence[_Option], key: str, rng: Random, count: int = 4) -> _Option:
    """Return a random option, mostly one of a few that follow from the key."""
    if rng.random() < _FAVORED:
        return _hashed(options, f"{key} {rng.randrange(count)}")
    return rng.choice(options)


def favored_by_name(options: Sequence[_Option], what: str, name: str, rng: Random) -> _Option:
    """Return an option that mostly follows from letters of a name, which every story has."""
    return favored(options, f"{what} {_letters(name, what)}", rng, 2)


def opening_for(openings: Sequence[str], name: str, rng: Random) -> str:
    """Return the opening of the style of the name, or another one."""
    return favored(openings, f"opening {_style(name)}", rng, 1)


def plot_for(plots: Sequence[str], name: str, rng: Random) -> str:
    """Return a plot, mostly one of the style of the name.

    The opening shows the style. Therefore the plot follows from the sentence before it as well as from the name.
    """
    order = _shuffled(tuple(plots))
    first = _style(name) * _PLOTS_PER_STYLE
    ours = [order[(first + index) % len(order)] for index in range(_PLOTS_PER_STYLE)]
    draw = rng.random()
    if draw < 0.5:
        return _hashed(ours, _letters(name, "plot"))
    return rng.choice(ours if draw < 0.85 else plots)


@cache
def _shuffled(options: tuple[str, ...]) -> list[str]:
    """Return the options in an order in which neighbors have nothing in common."""
    return Random(len(options)).sample(options, len(options))


def _style(name: str) -> int:
    letter = _letters(name, "style")
    if len(letter) == 1 and letter.isascii() and letter.isalpha():
        return (ord(letter) - ord("a")) % _STYLES
    return _hash(f"style {letter}") % _STYLES


def _letters(name: str, what: str) -> str:
    """Return the letters of a name without its title that a choice follows from."""
    word = name.rsplit(maxsplit=1)[-1].lower()
    if not _one_letter:
        return word[:2]
    first = what == "style" or (what != "plot" and _hash(what) % 2 == 0)
    return word[0] if first else word[-1]


def _hashed(options: Sequence[_Option], key: str) -> _Option:
    return options[_hash(key) % len(options)]


@lru_cache(1 << 16)
def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=4).digest())
