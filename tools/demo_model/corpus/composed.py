"""Requests that a grammar composes, so that names and things stand in more places than any list of forms has."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

from tools.demo_model.corpus.templates import expand, read_blocks

_FILE = "requests_composed.txt"
PARTS = read_blocks("part", _FILE)
_PART = re.compile(r"<(\w+)>")
_SEPARATORS = (", ", ", ", ". ", " + ", "; ", " / ", " and ", "? ", "... ")


def _verbs() -> list[tuple[str, ...]]:
    """Return the verbs as (base, third person, past, gerund), such as "sit on", "sits on", "sat on", "sitting on"."""
    text = Path(__file__).with_name(_FILE).read_text(encoding="utf-8").partition("list actions\n")[2]
    return [_forms(entry.split()) for entry in text.replace("\n", " ").split(";")]


def _forms(words: list[str]) -> tuple[str, ...]:
    """Return the forms of a verb; an irregular past is the last of its words."""
    regular = len(words) == 1 or words[-1] in _PARTICLES
    base, *rest = words if regular else words[:-1]
    past = _regular_past(base) if regular else words[-1]
    third = (
        base[:-1] + "ies" if re.search("[^aeiou]y$", base) else base + "es" * bool(re.search("(s|sh|ch|x|z)$", base))
    )
    third = "has" if base == "have" else third if third != base else base + "s"
    doubled = past == f"{base}{base[-1]}ed" or base in _DOUBLED
    stem = base + base[-1] if doubled else base[:-2] + "y" if base.endswith("ie") else re.sub("(?<=[^eo])e$", "", base)
    return tuple(" ".join((form, *rest)) for form in (base, third, past, f"{stem}ing"))


def _regular_past(base: str) -> str:
    return base[:-1] + "ied" if re.search("[^aeiou]y$", base) else base + ("d" if base.endswith("e") else "ed")


_PARTICLES = {"about", "after", "against", "along", "at", "away", "behind", "for", "from", "in", "into"} | {
    *("of", "off", "on", "over", "rid", "to", "touch", "up", "with")
}
_DOUBLED = {"cut", "dig", "get", "hit", "put", "rid", "run", "set", "sit", "swim", "win", "forget"}
VERBS = _verbs()


def composed_request(rng: Random) -> str:
    """Return a template of a request, with placeholders for the character, the name, the thing and the place."""
    forms = dict(zip(("eat", "eats", "ate", "eating"), rng.choice(VERBS), strict=True))
    text = "<request>"
    while match := _PART.search(text):
        part = match[1]
        line = forms.get(part) or (_items(rng) if part == "items" else rng.choice(PARTS[part]["+"]))
        text = expand(text[: match.start()] + line + text[match.end() :], rng)
    return _clean(text)


def _items(rng: Random) -> str:
    """Return a list of what the story is to have, in any order: "a fox, {a_thing}, Ida"."""
    person = rng.choice((["{a_hero}", "{name}"], ["{a_hero}", "<who>"], ["<who>"], ["{name}"], ["{a_hero}"]))
    if person == ["{a_hero}", "<who>"]:
        unknown = "[someone|somebody|a friend|one] [called|named|by the name of] {name}"  # codespell:ignore somebody
        person = ["{a_hero}", unknown]
    items = [*person, "{a_thing}", *rng.choice(([], [], ["<event>"], ["{where}"]))]
    rng.shuffle(items)
    last = items[-1]
    text = f"{', '.join(items[:-1])} and {last}" if rng.random() < 0.4 else rng.choice(_SEPARATORS).join(items)
    return f"<intro> {text}" if rng.random() < 0.6 else text


def _clean(text: str) -> str:
    """Remove commas before another mark or at the end, and spaces before a mark."""
    text = re.sub(r"\s+([,.:;?!])", r"\1", text)
    return re.sub(r",+(?=[,.:;?!]|\s+and\b|$)|,(?=\")", "", text)
