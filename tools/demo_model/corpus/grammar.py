"""Conversations for training: stories and follow-ups, small talk, and questions about the service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tools.demo_model.corpus.exercises import exercise, last_exercise, late_exercise
from tools.demo_model.corpus.requests import as_typed, example, request
from tools.demo_model.corpus.stories import (
    LENGTHS,
    MOODS,
    Story,
    continuation,
    moral,
    random_story,
    tell,
    with_hero,
    with_place,
)
from tools.demo_model.corpus.templates import choose, expand, read_blocks, with_article
from tools.demo_model.corpus.world import HEROES, PLACES, held_out

Message = dict[str, str]
TALK = read_blocks("talk", "talk.txt")
FOLLOW_UPS = read_blocks("follow", "follow_ups.txt")
MAX_WORDS = 560
"""A conversation ends before it exceeds the context."""

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who tells stories.",
    "You are a storyteller for children.",
    "Answer briefly.",
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.",
    "You are a chat bot. Be polite and concise.",
)
_AFTER_STORY = (
    "thanks",
    "praise",
    "blame",
    "bye",
    "who are you",
    "abilities",
    "joke",
    "the service",
    "yes",
    "no",
    "demo",
)


@dataclass(frozen=True)
class Mix:
    """Probabilities of the parts of conversations; the rest of the first turns are exercises.

    `composed` is the share of the requests that come from the grammar.
    """

    stories: float = 0.72
    small_talk: float = 0.18
    follow_up: float = 0.25
    subjects: tuple[str, ...] = (
        *TALK,
        *["anything else"] * 12,
        *["hello", "demo", "maker", "abilities", "who are you"] * 2,
        *["thanks", "arithmetic", "bye", "real"],
    )
    exercise: Callable[[Random], tuple[str, str]] = exercise
    composed: float = 0.0


LATE_MIX = Mix(stories=0.6, small_talk=0.12, exercise=late_exercise)
"""The mix of the second part of the training: nearly three times as many exercises, mostly of the gender of names."""
COMPOSED_MIX = Mix(stories=0.76, small_talk=0.1, exercise=late_exercise, composed=0.6)
"""The mix of the third part: requests that a grammar composes."""
LAST_MIX = Mix(stories=0.72, small_talk=0.1, exercise=last_exercise, composed=0.5)
"""The mix of the last part: also requests to repeat words that are easily mixed up."""


@dataclass
class Conversation:
    """The turns so far, and the latest story, to which follow-ups refer."""

    rng: Random
    mix: Mix = field(default_factory=Mix)
    messages: list[Message] = field(default_factory=list)
    story: Story | None = None

    def add(self, question: str, answer: str) -> None:
        """Add one turn: a user message and the reply."""
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": answer})

    def words(self) -> int:
        """Return the length of the conversation in words."""
        return sum(len(message["content"].split()) for message in self.messages)


def conversation(rng: Random, mix: Mix) -> list[Message]:
    """Return a conversation of one to a few turns, sometimes with a system prompt."""
    talk = Conversation(rng, mix)
    chatty = rng.random() < 0.04
    follow_up_probability = mix.follow_up
    draw = rng.random()
    if draw < mix.stories:
        _ask_for_story(talk)
    elif draw < mix.stories + mix.small_talk:
        _small_talk(talk, rng.choice(mix.subjects))
        follow_up_probability = 0.4
    else:
        talk.add(*mix.exercise(rng))
    while rng.random() < (0.9 if chatty else follow_up_probability) and talk.words() < MAX_WORDS - 150:
        _next_turn(talk)
        follow_up_probability = 0.5
    if rng.random() < 0.06:
        return [{"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)}, *talk.messages]
    return talk.messages


def only_exercise(rng: Random) -> list[Message]:
    """Return a conversation of one exercise."""
    talk = Conversation(rng)
    talk.add(*exercise(rng))
    return talk.messages


def raw_text(rng: Random) -> str:
    """Return a story without the chat template, for requests in raw mode."""
    return tell(random_story(rng), "normal", rng)


def _next_turn(talk: Conversation) -> None:
    draw = talk.rng.random()
    if talk.story is None:
        _ask_for_story(talk) if draw < 0.6 else _small_talk(talk, talk.rng.choice(talk.mix.subjects))
    elif draw < 0.7:
        talk.rng.choice(_FOLLOW_UPS)(talk, talk.story)
    elif draw < 0.82:
        _small_talk(talk, talk.rng.choice(_AFTER_STORY))
    elif draw < 0.88:
        _small_talk(talk, talk.rng.choice(talk.mix.subjects))
    else:
        _ask_for_story(talk)


def _small_talk(talk: Conversation, subject: str) -> None:
    rng = talk.rng
    names = {"digit": str(rng.randrange(1, 100))}
    block = TALK[subject]
    question = expand(rng.choice(block["q"]), rng)
    if "{" in question.replace("{digit}", ""):
        names |= example(rng).template_names()
    talk.add(as_typed(question.format_map(names), rng), choose(block["a"], rng))


def _ask_for_story(talk: Conversation) -> None:
    rng = talk.rng
    mood = rng.choice(MOODS) if rng.random() < 0.2 else ""
    length = rng.choices(LENGTHS, (0.14, 0.78, 0.08))[0]
    question, talk.story = request(length, mood, rng, talk.mix.composed)
    talk.add(question, tell(talk.story, length, rng))


def _other_plot(story: Story, rng: Random, mood: str | None = None) -> Story:
    fresh = random_story(rng, story.hero, story.place, mood=story.mood if mood is None else mood)
    while fresh.plot == story.plot:
        fresh = random_story(rng, story.hero, story.place, mood=fresh.mood)
    return fresh


def _tell(talk: Conversation, story: Story, subject: str, length: str = "normal", **more: str) -> None:
    """Add a follow-up whose reply is a story."""
    talk.story = story
    names = story.template_names() | more | {"other": with_article(story.hero)}
    intro = choose(FOLLOW_UPS[subject]["a"], talk.rng, **names).replace("@", "")
    question = choose(FOLLOW_UPS[subject]["q"], talk.rng, **names)
    talk.add(as_typed(question, talk.rng), f"{intro} {tell(story, length, talk.rng)}".strip())


def _another(talk: Conversation, story: Story) -> None:
    _tell(talk, _other_plot(story, talk.rng), "another")


def _shorter(talk: Conversation, story: Story) -> None:
    _tell(talk, story, "shorter", "short")


def _longer(talk: Conversation, story: Story) -> None:
    _tell(talk, story, "longer", "long")


def _other_hero(talk: Conversation, story: Story) -> None:
    heroes = [hero for hero in HEROES if not held_out(hero, story.place) and hero != story.hero]
    _tell(talk, with_hero(story, talk.rng.choice(heroes), talk.rng), "other hero")


def _other_place(talk: Conversation, story: Story) -> None:
    both = (story.hero, story.friend)
    places = [place for place in PLACES if place != story.place and not any(held_out(hero, place) for hero in both)]
    _tell(talk, with_place(story, talk.rng.choice(places), talk.rng), "other place")


def _other_mood(talk: Conversation, story: Story) -> None:
    mood = talk.rng.choice(MOODS)
    subject = "bedtime" if mood == "bedtime" else "other mood"
    _tell(talk, _other_plot(story, talk.rng, mood), subject, mood=mood)


def _next(talk: Conversation, story: Story) -> None:
    talk.add(as_typed(choose(FOLLOW_UPS["next"]["q"], talk.rng), talk.rng), continuation(story, talk.rng))


def _ask_about(subject: str) -> Callable[[Conversation, Story], None]:
    """Return a follow-up that asks about the story and gets a one-sentence reply."""

    def follow_up(talk: Conversation, story: Story) -> None:
        names = story.template_names() | {"moral": moral(story, talk.rng)}
        question = choose(FOLLOW_UPS[subject]["q"], talk.rng, **names)
        talk.add(as_typed(question, talk.rng), choose(FOLLOW_UPS[subject]["a"], talk.rng, **names))

    return follow_up


_FOLLOW_UPS = (
    *(
        _another,
        _another,
        _shorter,
        _shorter,
        _longer,
        _other_hero,
        _other_hero,
        _other_place,
        _other_mood,
        _next,
        _next,
    ),
    *map(_ask_about, ("name", "name", "place", "friend", "moral", "end", "true")),
)
