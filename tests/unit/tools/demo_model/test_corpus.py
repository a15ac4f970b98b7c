"""The training text of the demo model."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from functools import cache
from random import Random

import pytest
from tools.demo_model.corpus.choices import by_one_letter, opening_for
from tools.demo_model.corpus.composed import PARTS as GRAMMAR
from tools.demo_model.corpus.composed import VERBS, composed_request
from tools.demo_model.corpus.exercises import exercise
from tools.demo_model.corpus.grammar import (
    COMPOSED_MIX,
    FOLLOW_UPS,
    LAST_MIX,
    LATE_MIX,
    TALK,
    Message,
    Mix,
    conversation,
)
from tools.demo_model.corpus.names import RARE, REAL, requested_name
from tools.demo_model.corpus.requests import PHRASES, request
from tools.demo_model.corpus.stories import LENGTHS, MOODS, PLOTS, PLOTS_FOR_ANY_THING, Story, random_story, tell
from tools.demo_model.corpus.templates import read_blocks
from tools.demo_model.corpus.world import HEROES, PLACES, held_out, unseen
from tools.demo_model.prompts import PARTS, prompts

SHE, HE = r"\b(she|her|hers|herself)\b", r"\b(he|him|his|himself)\b"


def conversations(seed: int, count: int) -> list[list[Message]]:
    """Return conversations of the mixes of the training, one after another."""
    rng = Random(seed)
    return [
        conversation(rng, mix)
        for mix, _ in zip(itertools.cycle((Mix(), LATE_MIX, COMPOSED_MIX, LAST_MIX)), range(count))
    ]


@cache
def corpus() -> list[list[Message]]:
    """Return 1,200 conversations."""
    return conversations(11, 1200)


@cache
def stories() -> list[tuple[str, Story, str]]:
    """Return requests with the facts and the texts of their stories."""
    rng = Random(12)
    told = []
    for length, mood, _ in itertools.product(LENGTHS, ("", *MOODS), range(80)):
        question, story = request(length, mood, rng)
        told.append((question, story, tell(story, length, rng)))
    for _ in range(400):
        question, story = request("normal", "", rng, composed=1.0)
        told.append((question, story, tell(story, "normal", rng)))
    return told


def turns(messages: list[Message]) -> list[Message]:
    """Return the conversation without its system prompt."""
    return messages[1:] if messages[0]["role"] == "system" else messages


def test_grammar_is_deterministic() -> None:
    """Equal seeds give equal conversations, and other seeds give others."""
    first, second, other = (conversations(seed, 50) for seed in (3, 3, 4))
    assert first == second != other


def test_roles_alternate() -> None:
    """Every conversation alternates user and assistant, and ends with the assistant."""
    for messages in corpus():
        roles = [message["role"] for message in turns(messages)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_text_has_no_template_notation() -> None:
    """No message contains a placeholder, an unresolved alternative or a double space."""
    assert not [m["content"] for messages in corpus() for m in messages if re.search(r"[{}\[\]|]|  ", m["content"])]


def test_every_template_can_be_filled() -> None:
    """No template has a placeholder that stories do not fill, and none has unequal brackets."""
    rng = Random(14)
    names = random_story(rng).template_names() | {"digit": "1", "moral": "", "other": "", "mood": ""}
    for blocks in (PLOTS, TALK, FOLLOW_UPS, read_blocks("mood", "moods.txt", "moods_more.txt")):
        for template in itertools.chain(*(itertools.chain(*block.values()) for block in blocks.values())):
            assert template.count("[") == template.count("]"), template
            assert "{" not in template.format_map(names)


def test_plots_and_openings_are_many() -> None:
    """There are at least 66 plots and 48 ways to open a story."""
    moods = read_blocks("mood", "moods.txt", "moods_more.txt")
    assert len(PLOTS) >= 66
    assert sum(len(mood["opening"]) for mood in moods.values()) >= 48
    assert {"penalty", "pancake", "rocket", "anger"} <= set(PLOTS)


def test_pronouns_follow_the_main_character() -> None:
    """Only the main character has singular pronouns, and they have one gender."""
    for _, story, text in stories():
        assert not re.search(HE if story.female else SHE, text, re.IGNORECASE), text


def test_stories_keep_the_name_and_the_thing() -> None:
    """A story has the name, the thing, the wish and the topic of its request."""
    named = 0
    for question, story, text in stories():
        if re.search(rf"\b{re.escape(story.name)}\b", question):
            named += 1
            assert story.name in text, question
        for extra in story.extras:
            asked = {"thing": story.thing.noun, "wish": story.wish, "topic": story.topic}[extra]
            assert asked in text, question
    assert named > len(stories()) / 3


def test_no_sentence_is_in_many_stories() -> None:
    """No sentence is in more than 4% of the stories, so a model that learns them has no favorite."""
    counts: dict[str, int] = {}
    plain = [text for _, story, text in stories() if not story.mood]
    for text in plain:
        for sentence in set(re.split(r"(?<=[.!?])\s+", text)):
            counts[sentence] = counts.get(sentence, 0) + 1
    assert max(counts.values()) < len(plain) * 0.04


def test_choices_by_one_letter_are_as_even() -> None:
    """If the choices follow from the first or the last letter of the name, no sentence is in more than 5%."""
    counts: Counter[str] = Counter()
    rng = Random(21)
    with by_one_letter(enabled=True):
        for _ in range(2000):
            _, story = request("normal", "", rng, composed=0.5)
            counts.update(set(re.split(r"(?<=[.!?])\s+", tell(story, "normal", rng))))
    assert max(counts.values()) < 2000 * 0.05


def test_choices_by_one_letter_follow_from_it() -> None:
    """The opening follows from the first letter of the name: names with one of them share most openings."""
    with by_one_letter(enabled=True):
        openings = [
            opening_for("abcdefghijklmnopqrst", name, Random(seed)) for seed in range(50) for name in ("Ida", "Ivo")
        ]
        others = [opening_for("abcdefghijklmnopqrst", "Olga", Random(seed)) for seed in range(50)]
    (usual, count), *_ = Counter(openings).most_common()
    assert count > 60
    assert Counter(others).most_common(1)[0][0] != usual


def test_requests_have_many_forms() -> None:
    """There are 550 free forms of requests; each can be filled, with the name and the thing in many positions."""
    assert len(PHRASES["free"]) >= 550
    rng = Random(17)
    requests = [request("normal", "", rng) for _ in range(1000)]
    assert not [question for question, _ in requests if re.search(r"[{}|]|  ", question)]
    named = [(question, story) for question, story in requests if story.name in question]
    starts = sum(q.startswith(s.name) for q, s in named) / len(named)
    ends = sum(q.rstrip(".!? ").endswith(s.name) for q, s in named) / len(named)
    assert starts > 0.1
    assert ends > 0.08


OWN_LETTERS = 12
"""Letters of a form outside its placeholders and choices, from which on it is not just common English."""


def pattern(template: str) -> str:
    """Return a regular expression for the texts of a template; a placeholder is any text."""
    parts = re.split(r"([\[\]|]|\{\w+\})", template)
    special = {"[": "(?:", "]": ")", "|": "|"}
    return "".join(".+?" if part[:1] == "{" else special.get(part, re.escape(part)) for part in parts)


def own_letters(form: str) -> int:
    """Return the number of letters of a form outside its placeholders and choices."""
    return len(re.sub(r"\[[^\]]*\]|\{\w+\}|\W", "", form))


def test_no_form_is_that_of_a_prompt() -> None:
    """The evaluation measures requests in forms that training never saw, not only with other names."""
    texts = [prompt.text for part in PARTS for prompt in prompts(part)]
    forms = {form for phrases in PHRASES.values() for form in phrases}
    common = []
    for form in forms:
        expression = re.compile(rf"{pattern(form)}[.!?]?", re.IGNORECASE)
        if own_letters(form) >= OWN_LETTERS and any(expression.fullmatch(text) for text in texts):
            common.append(form)
    assert not common


def test_grammar_of_requests_has_no_dead_end() -> None:
    """Every part that a line refers to exists, except for the forms of the verb and the list of items."""
    used = {part for block in GRAMMAR.values() for line in block["+"] for part in re.findall(r"<(\w+)>", line)}
    assert used - {*GRAMMAR} == {"eat", "eats", "ate", "eating", "items"}
    assert {*GRAMMAR} - used == {"request", "intro", "event"}


def test_grammar_composes_many_requests() -> None:
    """Ten thousand requests have thousands of forms, with the name and the thing in any place, and correct marks."""
    rng = Random(19)
    forms = [composed_request(rng) for _ in range(10_000)]
    assert len(set(forms)) > 8000
    assert not [form for form in forms if re.search(r"[<>\[\]|]| [,.:;?!]|,[,.:;?!]|,$", form)]
    assert sum("thing}" in form for form in forms) > 8500
    assert sum("{name" in form for form in forms) > 8500


def test_forms_of_verbs() -> None:
    """Regular verbs follow the spelling rules, and irregular ones have their own past."""
    forms = {base: tuple(others) for base, *others in VERBS}
    assert len(forms) > 290
    assert forms["carry"] == ("carries", "carried", "carrying")
    assert forms["wash"] == ("washes", "washed", "washing")
    assert forms["drop"] == ("drops", "dropped", "dropping")
    assert forms["sit on"] == ("sits on", "sat on", "sitting on")
    assert forms["ride"] == ("rides", "rode", "riding")
    assert forms["free"] == ("frees", "freed", "freeing")
    assert forms["play with"] == ("plays with", "played with", "playing with")
    assert forms["have dinner with"] == ("has dinner with", "had dinner with", "having dinner with")
    assert forms["tie"] == ("ties", "tied", "tying")


def test_no_composed_request_is_a_prompt() -> None:
    """The grammar does not happen to compose a prompt of the evaluation, whatever the name and the thing."""
    texts = {prompt.text.rstrip(".!?").lower() for part in PARTS for prompt in prompts(part)}
    rng = Random(20)
    composed = {request("normal", "", rng, composed=1.0)[0].rstrip(".!?").lower() for _ in range(10_000)}
    assert not texts & composed
    made = {
        re.sub(r"\W", "", phrasing).lower() for phrasing in read_blocks("made", "../prompts_made.txt")["prompt"]["+"]
    }
    assert len(made) > 10
    assert not made & {re.sub(r"\W", "", composed_request(rng)).lower() for _ in range(10_000)}


def test_things_agree_with_their_number() -> None:
    """Several things and things that cannot be counted have "some" or a number, and plots that fit them."""
    plural = [(s, text) for _, s, text in stories() if "thing" in s.extras and s.thing.plural]
    assert len(plural) > 50
    for story, text in plural:
        assert not story.thing.indefinite.startswith(("a ", "an ")) or story.thing.adjective.startswith("a ")
        assert story.plot in PLOTS_FOR_ANY_THING or story.topic, text


def test_exercises_say_the_pronouns_of_names() -> None:
    """An exercise repeats words, or gives the pronoun of the gender that a name has in the lists."""
    rng = Random(16)
    genders = dict.fromkeys(REAL[True], "she") | dict.fromkeys(REAL[False], "he")
    pairs = [answer.split(", ") for question, answer in (exercise(rng) for _ in range(200)) if " she, " in answer]
    assert len(pairs) > 50
    for name, pronoun in (pair.rsplit(" ", 1) for pair in itertools.chain(*pairs)):
        assert genders.get(name, pronoun) == pronoun


def test_names_are_many_and_rare_ones_are_never_used() -> None:
    """Training has at least 3,700 real names; the evaluation's names and invented words are not among them."""
    rng = Random(15)
    rare = {*RARE[True], *RARE[False]}
    assert len({*REAL[True], *REAL[False]}) >= 3700
    assert not rare & {*REAL[True], *REAL[False]}
    assert not rare & {requested_name(rng, female) for female in (True, False) for _ in range(3000)}


def test_unseen_things_are_never_requested() -> None:
    """Things that only the evaluation uses are never the thing of a request."""
    for _, story, _ in stories():
        assert "thing" not in story.extras or story.thing.plural or not unseen(story.thing.noun)


def test_no_character_is_in_a_held_out_place() -> None:
    """Neither the main character of a story nor the friend is in a place that is held out for it."""
    for story in (story for _, story, _ in stories() if story.place in PLACES):
        assert not held_out(story.hero, story.place)
        assert not held_out(story.friend, story.place)


def test_held_out_share_of_the_pairs() -> None:
    """At least one pair in ten is held out, the fox by the sea among them."""
    pairs = [held_out(hero, place) for hero in HEROES for place in PLACES]
    assert sum(pairs) / len(pairs) > 0.1
    assert held_out("fox", next(place for place in PLACES if place.noun == "sea"))


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("Are you a demo", "demo model of llama2-grpc|this is a demo"),
        ("What can you do", "stor(y|ies)"),
        ("Who [made|built", "llama2-grpc project made me"),
    ],
)
def test_questions_about_itself_have_true_answers(question: str, fact: str) -> None:
    """Each answer to a question about the demo itself has the fact."""
    alternatives = question if "[" in question else question.split(maxsplit=1)[0]
    block = next(block for block in TALK.values() if any(alternatives in line for line in block["q"]))
    if question == "Are you a demo":
        block = TALK["demo"]
    assert all(re.search(fact, answer) for answer in block["a"])
