"""The notation of the text files: blocks of templates, in which [a|b] is a choice and {name} a placeholder."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from random import Random

Block = dict[str, list[str]]
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def read_blocks(path: Path, start: str) -> dict[str, Block]:
    """Read blocks that start with a line `start title`, followed by lines of the form `key template`."""
    blocks: dict[str, Block] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(" ")
        if not line or key == "#":
            continue
        if key == start:
            blocks[rest] = defaultdict(list)
        else:
            blocks[list(blocks)[-1]][key].append(rest)
    return blocks


def expand(template: str, rng: Random) -> str:
    """Replace every [a|b] by one of its alternatives."""
    return _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)


def choose(templates: list[str] | tuple[str, ...], rng: Random, **names: str) -> str:
    """Return one of the templates, expanded and with the names filled in."""
    return expand(rng.choice(templates), rng).format_map(names)


def capitalize_first(text: str) -> str:
    """Return the text with a capital first letter and the rest unchanged."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """Return the noun with its article by sound, such as "a fox", "an owl", "a unicorn"; covers the nouns used here."""
    vowel = noun[0].lower() in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"
