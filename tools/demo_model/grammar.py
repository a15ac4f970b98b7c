"""Conversations for training: stories and follow-ups, small talk, and questions about the service."""

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
"""A conversation ends before it exceeds the context."""

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
    """Probabilities of the parts of conversations; `invented_…` is the share with invented words."""

    stories: float = 0.76
    follow_up: float = 0.42
    invented_stories: float = 0.12
    invented_echoes: float = 0.1
    subjects: tuple[str, ...] = tuple(TALK)


MAINLY_STORIES = Mix()
MORE_SMALL_TALK = Mix(
    stories=0.45,
    follow_up=0.6,
    invented_stories=0.2,
    invented_echoes=0.5,
    subjects=(*TALK, *["anything else"] * 8, *["hello"] * 4, *["thanks", "arithmetic", "abilities", "bye"] * 2),
)


@dataclass
class Conversation:
    """The turns so far, and the latest story, to which follow-ups refer."""

    rng: Random
    mix: Mix = MAINLY_STORIES
    messages: list[Message] = field(default_factory=list)
    story: Story | None = None

    def add(self, question: str, answer: str) -> None:
        """Add one turn: a user message and the reply."""
        self.messages.append({"role": "user", "content": requests.as_typed(question, self.rng)})
        self.messages.append({"role": "assistant", "content": answer})

    def words(self) -> int:
        """Return the length of the conversation in words."""
        return sum(len(message["content"].split()) for message in self.messages)


def conversations(seed: int, mix: Mix = MAINLY_STORIES) -> Iterator[list[Message]]:
    """Yield an endless stream of conversations, equal for equal seeds."""
    rng = Random(seed)
    while True:
        yield conversation(rng, mix)


def conversation(rng: Random, mix: Mix) -> list[Message]:
    """Return a conversation of one to a few turns, sometimes with a system prompt."""
    talk = Conversation(rng, mix)
    chatty = rng.random() < 0.06
    follow_up_probability = mix.follow_up
    if rng.random() < mix.stories:
        _ask_for_story(talk)
    elif rng.random() < 0.3:
        _echo(talk)
    else:
        _small_talk(talk, rng.choice(mix.subjects))
        follow_up_probability = 0.6
    while rng.random() < (0.9 if chatty else follow_up_probability) and talk.words() < MAX_WORDS - 170:
        _next_turn(talk)
        follow_up_probability = 0.55
    if rng.random() < 0.05:
        return [{"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)}, *talk.messages]
    return talk.messages


def echo(rng: Random) -> list[Message]:
    """Return a conversation that only asks the model to repeat words."""
    talk = Conversation(rng)
    _echo(talk)
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
    digits = {"digit": str(talk.rng.randrange(1, 100))}
    block = TALK[subject]
    talk.add(choose(block["q"], talk.rng, **digits), choose(block["a"], talk.rng))


def _echo(talk: Conversation) -> None:
    """Add a request to repeat words; it is of little use in a chat, but is the fastest way to learn copying."""
    rng = talk.rng
    invented = talk.mix.invented_echoes
    words = [
        invented_word(rng) if rng.random() < invented else rng.choice(_ECHOED) for _ in range(rng.randrange(2, 14))
    ]
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
    if rng.random() < talk.mix.invented_stories:
        story, question = _with_invented_word(story, length, rng)
    answer = tell(story, length, rng)
    while story.thing in question and story.thing not in answer:
        story = replace(story, plot=rng.choice(list(PLOTS)))
        answer = tell(story, length, rng)
    talk.story = story
    talk.add(question, answer)


def _with_invented_word(story: Story, length: str, rng: Random) -> tuple[Story, str]:
    """Return a story with an invented character, place or name, and a request that names it."""
    kind, changed = rng.randrange(3), story
    while changed is story or held_out(changed.hero, changed.place):
        word, place = invented_word(rng), invented_place(rng)
        changed = replace(story, **({"hero": word}, {"place": place}, {"name": word.capitalize()})[kind])
    expected = (changed.hero, changed.place.noun, changed.name)[kind]
    while expected not in (question := requests.ask_for_both(changed, length, rng)):
        pass
    return changed, question


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
    """Return a follow-up that asks about the story and gets a one-sentence reply."""

    def follow_up(talk: Conversation, story: Story) -> None:
        names = story.template_names() | {"moral": moral(story, talk.rng)}
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
