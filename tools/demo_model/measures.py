"""Measures of a story: words, pronouns, the name and the thing of the prompt, sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tools.demo_model.prompts import Prompt

_CORPUS = Path(__file__).with_name("corpus")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_PRONOUNS = {"she": {"she", "her", "hers", "herself"}, "he": {"he", "him", "his", "himself"}}


def words(text: str) -> list[str]:
    """Return the words in lower case, without the possessive 's."""
    return [re.sub(r"['’]s$", "", word) for word in _WORD.findall(text.lower())]


@cache
def vocabulary() -> frozenset[str]:
    """Return the words of the training text, without the lists of names that only requests have."""
    files = (path for path in _CORPUS.glob("*.txt") if not path.name.startswith("names"))
    texts = [path.read_text(encoding="utf-8").replace("_", " ") for path in files]
    return frozenset(word for text in texts for word in words(text)).union(*_PRONOUNS.values())


def non_words(prompt: Prompt, story: str) -> list[str]:
    """Return the words of the story that are neither in the training text nor in the prompt.

    A name that the model knows but the prompt does not have counts as well: it is a name that was not kept.
    """
    allowed = vocabulary() | set(words(prompt.text))
    return [word for word in words(story) if word not in allowed]


def pronoun_slips(prompt: Prompt, story: str) -> bool:
    """Return whether a pronoun contradicts the prompt or the rest of the story.

    In the training text only the main character has a singular pronoun.
    """
    found = {gender for gender, forms in _PRONOUNS.items() if forms & set(words(story))}
    return bool(found - {prompt.pronoun}) if prompt.pronoun in _PRONOUNS else len(found) > 1


def keeps_name(prompt: Prompt, story: str) -> bool:
    """Return whether the story has the name of the prompt, with a capital letter."""
    name = prompt.name[:1].upper() + prompt.name[1:]
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", story) is not None


def mentions_thing(prompt: Prompt, story: str) -> bool:
    """Return whether the story has the thing of the prompt, in the singular or the plural."""
    thing = prompt.thing.lower()
    stem = thing if thing.endswith("ss") else thing.removesuffix("s")
    return re.search(rf"\b{re.escape(stem)}(s|es)?\b", story.lower()) is not None


def sentences(story: str) -> list[str]:
    """Return the sentences of a story."""
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?]\")\s+", story.strip())


def frequent_sentences(stories: Iterable[str]) -> list[tuple[str, int]]:
    """Return sentences with the number of stories that have them, most frequent first."""
    return Counter(sentence for story in stories for sentence in set(sentences(story))).most_common()
