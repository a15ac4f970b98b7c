"""Requests for a story, phrased as users type them, and the stories that they ask for."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from tools.demo_model.corpus.names import invented_noun, known_name, requested_name
from tools.demo_model.corpus.stories import (
    PLOTS,
    PLOTS_WITHOUT_THING,
    Story,
    Thing,
    favored,
    random_story,
    with_name,
)
from tools.demo_model.corpus.templates import capitalize_first, choose, expand, placeholders, read_blocks, with_article
from tools.demo_model.corpus.world import (
    ADJECTIVES,
    COLORS,
    HEROES,
    MENS_RELATIONS,
    MORE_ADJECTIVES,
    MORE_HEROES,
    MORE_PLACES,
    MORE_THINGS,
    PETS,
    PLACES,
    PREDICATES,
    SETTINGS,
    THING_ADJECTIVES,
    THINGS,
    TOPICS,
    VERBS,
    WISHES,
    WOMENS_RELATIONS,
    Place,
    held_out,
    is_female,
    place,
    unseen,
)

PHRASES = {title: block["+"] for title, block in read_blocks("phrase", "requests.txt", "requests_more.txt").items()}
_PLOT_PHRASES = [title for title in PHRASES if title.startswith("plot ")]
_HERO, _PLACE, _NAME = {"hero", "a_hero"}, {"where", "there", "place_noun", "noun", "back"}, {"name", "names"}
_THING = {"thing", "a_thing"}
_LOSES = re.compile(r"lost \{his|find \{his|Where is \{names|[Ss]tole \{names|loses")
_CHILDREN = {True: "girl", False: "boy"}


def request(length: str, mood: str, rng: Random) -> tuple[str, Story]:
    """Return a request as users type it, and a story with everything that the request names."""
    frame, loose = _frame(length, mood, rng)
    plot = "lost" if _LOSES.search(frame) else ""
    if loose and rng.random() < 0.2:
        title = rng.choice(_PLOT_PHRASES)
        plot, frame = title.removeprefix("plot "), expand(rng.choice(PHRASES[title]), rng)
    slots = placeholders(frame)
    story, words = _facts(slots, plot, mood, rng)
    names = story.template_names() | words
    names |= {"noun": story.place.noun, "place_noun": story.place.noun, "does": PLOTS[story.plot]["does"][0]}
    names |= {capitalize_first(key): capitalize_first(value) for key, value in names.items()}
    text = frame.format_map(names)
    return as_typed(text, rng, noise=0.12 if loose or "." not in text else 0.0), story


def example(rng: Random) -> Story:
    """Return a story whose words fill the placeholders of a question that asks for no story."""
    slots = {"name", "hero", "where", "thing", "wish", "topic", "friend_name"}
    return _facts(slots, "", "", rng)[0]


def _frame(length: str, mood: str, rng: Random) -> tuple[str, bool]:
    """Return a template of a request, and whether it says neither length nor mood."""
    if length == "normal" and not mood and rng.random() < 0.45:
        frame = rng.choice(PHRASES["free"] if rng.random() < 0.75 else PHRASES["loose"])
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
    words = {
        "verbs": rng.choice(VERBS),
        "predicate": rng.choice(PREDICATES),
        "a_hero2": with_article(rng.choice(HEROES)),
    }
    named, female = bool(slots & _NAME), rng.random() < 0.5
    hero = _requested_hero(rng) if slots & _HERO else ""
    for relation, is_woman, nouns in (("girl", True, WOMENS_RELATIONS), ("boy", False, MENS_RELATIONS)):
        if relation in slots:
            hero, words[relation] = hero or _CHILDREN[is_woman], rng.choice(nouns)
            female = is_woman
    if "pet" in slots:
        hero = words["pet"] = rng.choice(PETS)
    if hero and not slots & {"girl", "boy"}:
        female = is_female(hero, rng)
    if named and not hero:
        hero = _unnamed_hero(female, rng)
    where = _requested_place(rng) if slots & _PLACE else None
    if hero and where and held_out(hero, where):
        return _facts(slots, plot, mood, rng)
    thing = _requested_thing(rng) if slots & _THING else None
    name = requested_name(rng, female) if named else known_name(rng, female)
    key = hero if slots & _HERO and hero in HEROES else thing.noun if thing else name[:1] if named else hero
    plots = PLOTS_WITHOUT_THING if thing and thing.plural else tuple(PLOTS)
    topic, wish = (rng.choice(TOPICS) if "topic" in slots else ""), (rng.choice(WISHES) if "wish" in slots else "")
    plot = plot or _plot_about(topic, rng) or favored(plots, key or topic, rng)
    story = with_name(random_story(rng, hero, where, plot, mood), name, female)
    if slots & _HERO:
        adjectives = ADJECTIVES if rng.random() < 0.5 else MORE_ADJECTIVES
        story = replace(story, adjective=rng.choice(adjectives) if rng.random() < 0.35 else "")
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


def _requested_hero(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.68:
        return rng.choice(HEROES)
    noun = rng.choice(MORE_HEROES if draw < 0.85 else MORE_THINGS) if draw < 0.9 else invented_noun(rng)
    return noun if not unseen(noun) else _requested_hero(rng)


def _unnamed_hero(female: bool, rng: Random) -> str:
    """Return the character of a story whose request only has a name."""
    while True:
        hero = _CHILDREN[female] if rng.random() < 0.4 else rng.choice(HEROES)
        if is_female(hero, rng) == female:
            return hero


def _requested_place(rng: Random) -> Place:
    draw, setting = rng.random(), rng.choice(list(SETTINGS.values()))
    if draw < 0.68:
        return rng.choice(PLACES)
    if draw < 0.86:
        return place(rng.choice(MORE_PLACES), setting)
    word = invented_noun(rng)
    phrase = rng.choice(
        ("in {}", "in a {}", "on a {}", "at the {}", "by a {}", "in the land of {}", "on the planet {}")
    )
    proper = phrase.split("{")[0].split()[-1] in {"in", "of", "planet"}
    return place(phrase.format(capitalize_first(word) if proper else word), setting)


def _requested_thing(rng: Random) -> Thing:
    draw = rng.random()
    noun = rng.choice(THINGS) if draw < 0.25 else rng.choice(MORE_THINGS) if draw < 0.82 else invented_noun(rng)
    if unseen(noun):
        return _requested_thing(rng)
    adjective = rng.choice(THING_ADJECTIVES if rng.random() < 0.7 else COLORS) if rng.random() < 0.45 else ""
    plural = rng.random() < 0.1 and noun[-1] not in "shxyz"
    return Thing(adjective, f"{noun}s" if plural else noun, plural)


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
        text = f"{choose(PHRASES['before'], rng)}. {text}"
    if rng.random() < noise:
        text = f"{text.rstrip('.!? ')}. {choose(PHRASES['after'], rng)}"
    return text.lower() if draw < 0.17 else text.upper() if draw > 0.985 else text
