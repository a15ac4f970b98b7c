"""Conversations for training: stories and what is said after them, small talk, questions about the service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tools.demo_model import requests
from tools.demo_model.stories import (
    LENGTHS,
    MOODS,
    PLOTS,
    Story,
    continuation,
    moral,
    random_story,
    tell,
    with_hero,
    with_place,
)
from tools.demo_model.templates import choose, expand, read_blocks, with_article
from tools.demo_model.world import (
    HEROES,
    MENS_NAMES,
    PLACES,
    THINGS,
    WOMENS_NAMES,
    held_out,
    invented_place,
    invented_word,
)

Message = dict[str, str]
_HERE = Path(__file__).parent
TALK = read_blocks(_HERE / "talk.txt", "talk")
FOLLOW_UPS = read_blocks(_HERE / "follow_ups.txt", "follow")
MAX_WORDS = 780
"""A conversation ends before it could outgrow the context."""

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who tells stories.",
    "You are a storyteller for children.",
    "Answer briefly.",
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.",
    "You are a chat bot. Be polite and concise.",
)
_AFTER_STORY = ("thanks", "praise", "blame", "bye", "who are you", "abilities", "joke", "the service", "yes", "no")

_ECHOED = (*HEROES, *THINGS, *WOMENS_NAMES, *MENS_NAMES)


@dataclass(frozen=True)
class Mix:
    """How often what comes; `strange_…` is the share with words that nobody has ever heard."""

    stories: float = 0.76
    go_on: float = 0.42
    strange_stories: float = 0.12
    strange_echoes: float = 0.1
    subjects: tuple[str, ...] = tuple(TALK)


MAINLY_STORIES = Mix()
MORE_SMALL_TALK = Mix(
    stories=0.45,
    go_on=0.6,
    strange_stories=0.2,
    strange_echoes=0.5,
    subjects=(*TALK, *["anything else"] * 8, *["hello"] * 4, *["thanks", "arithmetic", "abilities", "bye"] * 2),
)


@dataclass
class Conversation:
    """The turns so far, and the story that "it" refers to."""

    rng: Random
    mix: Mix = MAINLY_STORIES
    messages: list[Message] = field(default_factory=list)
    story: Story | None = None

    def add(self, question: str, answer: str) -> None:
        """One turn: what the user says and what the model replies."""
        self.messages.append({"role": "user", "content": requests.spoken(question, self.rng)})
        self.messages.append({"role": "assistant", "content": answer})

    def words(self) -> int:
        """How long it has become."""
        return sum(len(message["content"].split()) for message in self.messages)


def conversations(seed: int, mix: Mix = MAINLY_STORIES) -> Iterator[list[Message]]:
    """An endless stream of conversations, the same for the same seed."""
    rng = Random(seed)
    while True:
        yield conversation(rng, mix)


def conversation(rng: Random, mix: Mix) -> list[Message]:
    """A single conversation of one to a few turns, now and then under a system prompt."""
    talk = Conversation(rng, mix)
    chatty = rng.random() < 0.06
    go_on = mix.go_on
    if rng.random() < mix.stories:
        _ask_for_story(talk)
    elif rng.random() < 0.3:
        _echo(talk)
    else:
        _small_talk(talk, rng.choice(mix.subjects))
        go_on = 0.6
    while rng.random() < (0.9 if chatty else go_on) and talk.words() < MAX_WORDS - 170:
        _next_turn(talk)
        go_on = 0.55
    if rng.random() < 0.05:
        return [{"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)}, *talk.messages]
    return talk.messages


def echo(rng: Random) -> list[Message]:
    """A conversation of nothing but words to be said again."""
    talk = Conversation(rng)
    _echo(talk)
    return talk.messages


def raw_text(rng: Random) -> str:
    """A story without any template, for requests in raw mode."""
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
    digits = {"digit": str(talk.rng.randrange(1, 100))}
    block = TALK[subject]
    talk.add(choose(block["q"], talk.rng, **digits), choose(block["a"], talk.rng))


def _echo(talk: Conversation) -> None:
    """Words to be said again: little use in a chat, but nothing teaches copying faster."""
    rng = talk.rng
    strange = talk.mix.strange_echoes
    words = [invented_word(rng) if rng.random() < strange else rng.choice(_ECHOED) for _ in range(rng.randrange(2, 14))]
    answer = ", ".join(words)
    question = expand(f"[Repeat|Say|Please repeat|Repeat after me|Say after me]: {answer}", rng)
    talk.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _ask_for_story(talk: Conversation) -> None:
    rng = talk.rng
    mood = rng.choice(MOODS) if rng.random() < 0.25 else ""
    length = rng.choices(LENGTHS, (0.15, 0.75, 0.1))[0]
    story = random_story(rng, mood=mood)
    ask = rng.choices((requests.ask_for_both, requests.ask_for_one, requests.ask_for_any), (0.75, 0.2, 0.05))[0]
    question = ask(story, length, rng)
    if rng.random() < talk.mix.strange_stories:
        story, question = _with_strange_word(story, length, rng)
    answer = tell(story, length, rng)
    while story.thing in question and story.thing not in answer:
        story = replace(story, plot=rng.choice(list(PLOTS)))
        answer = tell(story, length, rng)
    talk.story = story
    talk.add(question, answer)


def _with_strange_word(story: Story, length: str, rng: Random) -> tuple[Story, str]:
    """A story about a strange character, place or name, and the request that names it."""
    kind, strange = rng.randrange(3), story
    while strange is story or held_out(strange.hero, strange.place):
        word, place = invented_word(rng), invented_place(rng)
        strange = replace(story, **({"hero": word}, {"place": place}, {"name": word.capitalize()})[kind])
    expected = (strange.hero, strange.place.noun, strange.name)[kind]
    while expected not in (question := requests.ask_for_both(strange, length, rng)):
        pass
    return strange, question


def _other_plot(story: Story, rng: Random, mood: str | None = None) -> Story:
    fresh = random_story(rng, story.hero, story.place, mood=story.mood if mood is None else mood)
    while fresh.plot == story.plot:
        fresh = random_story(rng, story.hero, story.place, mood=fresh.mood)
    return fresh


def _tell(talk: Conversation, story: Story, subject: str, length: str = "normal", **more: str) -> None:
    """A follow-up that is answered with a story."""
    talk.story = story
    names = story.names() | more | {"other": with_article(story.hero)}
    intro = choose(FOLLOW_UPS[subject]["a"], talk.rng, **names).replace("@", "")
    question = choose(FOLLOW_UPS[subject]["q"], talk.rng, **names)
    talk.add(question, f"{intro} {tell(story, length, talk.rng)}".strip())


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
    talk.add(choose(FOLLOW_UPS["next"]["q"], talk.rng), continuation(story, talk.rng))


def _ask_about(subject: str) -> Callable[[Conversation, Story], None]:
    """A question about the story that a sentence answers."""

    def follow_up(talk: Conversation, story: Story) -> None:
        names = story.names() | {"moral": moral(story, talk.rng)}
        question = choose(FOLLOW_UPS[subject]["q"], talk.rng, **names)
        talk.add(question, choose(FOLLOW_UPS[subject]["a"], talk.rng, **names))

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
