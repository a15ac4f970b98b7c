"""The notation of the text files: blocks of templates, in which [a|b] is a choice and {name} a placeholder."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from random import Random

Block = dict[str, list[str]]
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_HERE = Path(__file__).parent


def read_blocks(start: str, *files: str) -> dict[str, Block]:
    """Read blocks that start with a line `start title`, followed by lines of the form `key template`.

    Blocks of one title in several files are joined.
    """
    blocks: dict[str, Block] = {}
    for file in files:
        title = ""
        for line in (_HERE / file).read_text(encoding="utf-8").splitlines():
            key, _, rest = line.partition(" ")
            if not line or key == "#":
                continue
            if key == start:
                title = rest
                blocks.setdefault(title, defaultdict(list))
            elif key in {"words", "list"}:
                title = ""
            elif title:
                blocks[title][key].append(rest)
    return blocks


def expand(template: str, rng: Random) -> str:
    """Replace every [a|b] by one of its alternatives; a choice may contain choices."""
    while True:
        expanded = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
        if expanded == template:
            return expanded
        template = expanded


def choose(templates: list[str] | tuple[str, ...], rng: Random, **names: str) -> str:
    """Return one of the templates, expanded and with the names filled in."""
    return expand(rng.choice(templates), rng).format_map(names)


def placeholders(template: str) -> set[str]:
    """Return the names of the placeholders of a template, in lower case."""
    return {name.lower() for name in _PLACEHOLDER.findall(template)}


def capitalize_first(text: str) -> str:
    """Return the text with a capital first letter and the rest unchanged."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """Return the noun with its article by sound, such as "a fox", "an owl", "a unicorn"; covers the nouns used here."""
    lower = noun.lower()
    vowel = lower[0] in "aeiou" and not lower.startswith(("uni", "uku", "eu", "one", "use"))
    return f"{'an' if vowel or lower.startswith(('hour', 'honest', 'x-ray')) else 'a'} {noun}"
