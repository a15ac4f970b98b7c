"""Requests for a story, phrased as users type them, and the stories that they ask for."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from tools.demo_model.corpus.choices import favored, plot_for
from tools.demo_model.corpus.composed import composed_request
from tools.demo_model.corpus.names import requested_name
from tools.demo_model.corpus.slots import (
    compound_thing,
    fillers,
    requested_character,
    requested_place,
    requested_thing,
    unnamed_hero,
)
from tools.demo_model.corpus.stories import (
    KNOWN_NAMES,
    PLOTS,
    PLOTS_FOR_ANY_THING,
    Story,
    free_hero,
    random_story,
    usual_place,
    with_name,
)
from tools.demo_model.corpus.templates import capitalize_first, choose, expand, placeholders, read_blocks, with_article
from tools.demo_model.corpus.world import ADJECTIVES, HEADLINES, MORE_ADJECTIVES, TOPICS, WISHES, held_out

PHRASES = {
    title: block["+"]
    for title, block in read_blocks("phrase", "requests.txt", "requests_more.txt", "requests_free.txt").items()
}
_PLOT_PHRASES = [title for title in PHRASES if title.startswith("plot ")]
_HERO, _PLACE, _NAME = {"hero", "a_hero"}, {"where", "there", "place_noun", "noun", "back"}, {"name", "names"}
_THING = {"thing", "a_thing"}
_LOSES = re.compile(r"(lost|find|forgot|cannot find) \{his|Where is \{names|[Ss]tole \{names|loses|stole the|missing")
FREE_SHARE = 0.7
"""Share of the free forms among the requests that say neither length nor mood."""


def request(length: str, mood: str, rng: Random, composed: float = 0.0) -> tuple[str, Story]:
    """Return a request as users type it, and a story with everything that the request names.

    A share of the requests that say neither length nor mood, `composed`, comes from the grammar.
    """
    if composed and length == "normal" and not mood and rng.random() < composed:
        return _composed(rng)
    frame, loose = _frame(length, mood, rng)
    plot = "lost" if _LOSES.search(frame) else ""
    if loose and rng.random() < 0.14:
        title = rng.choice(_PLOT_PHRASES)
        plot, frame = title.removeprefix("plot "), expand(rng.choice(PHRASES[title]), rng)
    slots = placeholders(frame)
    story, words = _facts(slots, plot, mood, rng)
    names = story.template_names() | words
    names |= {"noun": story.place.noun, "place_noun": story.place.noun, "does": PLOTS[story.plot]["does"][0]}
    names |= {capitalize_first(key): capitalize_first(value) for key, value in names.items()}
    text = " ".join(frame.format_map(names).split())
    return as_typed(text, rng, noise=0.2 if loose or "." not in text else 0.0), story


def _composed(rng: Random) -> tuple[str, Story]:
    """Return a request of the grammar and its story; one thing in eight has a name of two words, such as "owl lamp"."""
    frame = composed_request(rng)
    plot = "lost" if _LOSES.search(frame) else ""
    slots = placeholders(frame) | ({"compound"} if rng.random() < 0.12 else set())
    story, words = _facts(slots, plot, "", rng)
    names = story.template_names() | words
    names |= {capitalize_first(key): capitalize_first(value) for key, value in names.items()}
    return as_typed(" ".join(frame.format_map(names).split()), rng, noise=0.1), story


def example(rng: Random) -> Story:
    """Return a story whose words fill the placeholders of a question that asks for no story."""
    slots = {"name", "hero", "where", "thing", "wish", "topic", "friend_name"}
    return _facts(slots, "", "", rng)[0]


def _frame(length: str, mood: str, rng: Random) -> tuple[str, bool]:
    """Return a template of a request, and whether it says neither length nor mood."""
    if length == "normal" and not mood and rng.random() < FREE_SHARE:
        frame = rng.choice(PHRASES["free"] if rng.random() < 0.85 else PHRASES["loose"])
        return expand(frame.replace("{kind}", "a story"), rng), True
    kind = with_article(
        " ".join(word for word in (rng.choice(PHRASES.get(key, [""])) for key in (length, mood, "story")) if word)
    )
    if rng.random() < 0.04:
        return expand(rng.choice(PHRASES["open"]).replace("{kind}", kind), rng), False
    subject = rng.choices(("what", "both", "hero", "place", "plot"), (0.6, 0.2, 0.1, 0.05, 0.05))[0]
    if subject == "plot":
        what = rng.choice([topic for block in PLOTS.values() for topic in block["topic"][0].split("; ")])
    else:
        what = rng.choice(PHRASES[subject])
    frame = rng.choice(PHRASES["about"]).replace("{kind}", kind).replace("{what}", what)
    return expand(frame, rng), False


def _facts(slots: set[str], plot: str, mood: str, rng: Random) -> tuple[Story, dict[str, str]]:
    """Return a story with the facts that the placeholders ask for, and the words of the other placeholders."""
    named = bool(slots & _NAME)
    hero, female, relations = requested_character(slots, bool(slots & _HERO), rng)
    words = fillers(rng) | relations
    if named and not hero:
        hero = unnamed_hero(female, rng)
    where = requested_place(rng) if slots & _PLACE else None
    if hero and where and held_out(hero, where):
        return _facts(slots, plot, mood, rng)
    thing = (compound_thing if "compound" in slots else requested_thing)(rng) if slots & _THING else None
    topic, wish = (rng.choice(TOPICS) if "topic" in slots else ""), (rng.choice(WISHES) if "wish" in slots else "")
    key = thing.noun if thing else hero or topic or (where.noun if where else str(rng.random()))
    if not hero:
        hero, female = free_hero(where, rng)
    name = requested_name(rng, female) if named else favored(KNOWN_NAMES[female], f"name {key}", rng, 3)
    plots = PLOTS_FOR_ANY_THING if thing and thing.plural else tuple(PLOTS)
    plot = plot or _plot_about(topic, rng) or plot_for(plots, name, rng)
    story = random_story(rng, hero, where or usual_place(hero, name, rng), plot, mood)
    story = with_name(story, name, female, rng)
    if slots & _HERO:
        adjectives = ADJECTIVES if rng.random() < 0.5 else MORE_ADJECTIVES
        story = replace(story, adjective=rng.choice(adjectives) if rng.random() < 0.3 else "")
    extras = {extra for extra, asked in (("thing", thing), ("wish", wish), ("topic", topic)) if asked}
    story = replace(story, thing=thing or story.thing, wish=wish, topic=topic, extras=frozenset(extras))
    if "friend_name" in slots:
        story = replace(story, friend_name=requested_name(rng, rng.random() < 0.5))
    if story.friend_name.split()[0] in story.name or story.name.split()[0] in story.friend_name:
        return _facts(slots, plot, mood, rng)
    return story, words


def _plot_about(topic: str, rng: Random) -> str:
    """Return a plot about the topic, or an empty text if no plot is."""
    plots = [plot for plot, block in PLOTS.items() if topic and topic in block["topic"][0].split("; ")]
    return rng.choice(plots) if plots else ""


def as_typed(text: str, rng: Random, noise: float = 0.0) -> str:
    """Return the request as users type it: with or without capitals, "please" and a full stop."""
    if rng.random() < 0.1 and "please" not in text.lower() and "." not in text:
        text += rng.choice((" please", ", please"))
    elif rng.random() < 0.04:
        text = rng.choice(("Hi, ", "Hello! ", "OK, ", "So, ")) + text
    draw = rng.random()
    question = text.split()[0].lower() in {
        "can", "could", "would", "do", "does", "what", "who", "how", "is", "are", "which", "where", "why", "when"
    }  # fmt: skip
    end = "?" if question else rng.choice(("", ".", ".", "!"))
    text = capitalize_first(text)
    text = text if draw < 0.4 or text[-1] in ".!?" else text + end
    if rng.random() < noise:
        before = choose(PHRASES["before"], rng, headline=rng.choice(HEADLINES))
        text = f"{before}{rng.choice('..!:')} {text}"
    if rng.random() < noise:
        text = f"{text.rstrip('.!? ')}. {choose(PHRASES['after'], rng)}"
    return text.lower() if draw < 0.17 else text.upper() if draw > 0.985 else text
