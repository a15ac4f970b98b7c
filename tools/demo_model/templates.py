"""The notation of the text files: blocks of templates, in which [a|b] chooses and {name} is filled in."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from random import Random

Block = dict[str, list[str]]
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def read_blocks(path: Path, start: str) -> dict[str, Block]:
    """Read blocks that begin with `start title` and go on with lines of the form `key template`."""
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
    """Take one of the alternatives of every [a|b]."""
    return _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)


def choose(templates: list[str] | tuple[str, ...], rng: Random, **names: str) -> str:
    """One of the templates, expanded and with the names filled in."""
    return expand(rng.choice(templates), rng).format_map(names)


def capital(text: str) -> str:
    """The text with a capital first letter; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """Such as "a fox", "an owl", "a unicorn": by sound, as far as the nouns here need it."""
    vowel = noun[0].lower() in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"
