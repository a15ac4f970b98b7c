"""The evaluation of the demo model: its prompts and its measures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

import pytest
from tools.demo_model.corpus.grammar import Mix, conversation
from tools.demo_model.corpus.names import RARE, REAL
from tools.demo_model.corpus.world import unseen
from tools.demo_model.evaluate import Answer, failures, report
from tools.demo_model.measures import (
    frequent_sentences,
    keeps_name,
    mentions_thing,
    non_words,
    pronoun_slips,
    sentences,
)
from tools.demo_model.prompts import PARTS, PROMPTS_PER_KIND, Prompt, made, prompts, written

ALICE = Prompt("a story about alice and a grobble", "Alice", "she", "grobble", listed=True)
STORY = 'Once upon a time there was a girl called Alice. She loved her grobble. "Good night," said Alice\'s friend.'


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_500_prompts(part: str) -> None:
    """Half of the prompts are written, half are made, and no prompt occurs twice."""
    assert len(written(part)) == len(made(part)) == PROMPTS_PER_KIND
    assert len({prompt.text for prompt in prompts(part)}) == 2 * PROMPTS_PER_KIND


def test_parts_share_no_prompt() -> None:
    """No prompt of the tuning part is in the final part."""
    tuning, final = ({prompt.text.lower() for prompt in prompts(part)} for part in PARTS)
    assert not tuning & final


@pytest.mark.parametrize("part", PARTS)
def test_labels_are_words_of_the_prompts(part: str) -> None:
    """The name and the thing of each label are in the prompt, and the pronoun is one of three."""
    for prompt in prompts(part):
        assert prompt.name.lower() in prompt.text.lower()
        assert prompt.thing in prompt.text.lower()
        assert prompt.pronoun in {"she", "he", "any"}


def test_training_never_saw_the_prompts() -> None:
    """No prompt is in a sample of the training text, and the made prompts have words that no training text has."""
    rng = Random(21)
    sample = {m["content"].lower().strip(".!? ") for _ in range(4000) for m in conversation(rng, Mix())}
    for prompt in itertools.chain(*map(prompts, PARTS)):
        assert prompt.text.lower().strip(".!? ") not in sample
    for prompt in itertools.chain(*map(made, PARTS)):
        assert prompt.name in RARE[True] + RARE[False] or unseen(prompt.name)
        assert prompt.name not in REAL[True] + REAL[False]
        assert not prompt.thing or unseen(prompt.thing)


def test_a_good_story_misses_no_criterion() -> None:
    """A story with the name, the thing and the right pronouns passes."""
    assert failures(Answer(ALICE, STORY, 40, ended=True)) == []


@pytest.mark.parametrize(
    ("old", "new", "missed"),
    [
        ("Alice", "Alicia", ["non-word alicia alicia", "name"]),
        ("girl", "gril", ["non-word gril"]),
        ("She", "He", ["pronoun"]),
        ("grobble", "lamp", ["thing"]),
    ],
)
def test_each_slip_is_found(old: str, new: str, missed: list[str]) -> None:
    """A changed word in a good story misses the criterion for it."""
    assert failures(Answer(ALICE, STORY.replace(old, new), 40, ended=True)) == missed


def test_a_story_without_end_is_found() -> None:
    """A reply that reaches the limit of tokens misses a criterion."""
    assert failures(Answer(ALICE, STORY, 256, ended=False)) == ["no end"]


def test_words_of_the_prompt_are_words() -> None:
    """The story may use any word of its prompt, also in the possessive."""
    prompt = Prompt("Quixlby has a FLURM", "Quixlby", "any", "flurm", listed=False)
    assert non_words(prompt, "Quixlby's flurm was old.") == []
    assert non_words(prompt, "Quixly had a flurm.") == ["quixly"]


def test_pronouns_without_a_label_must_agree() -> None:
    """If the prompt leaves the gender open, the story has pronouns of one gender."""
    prompt = Prompt("a story about a fox", "", "any", "", listed=False)
    assert not pronoun_slips(prompt, "He saw his friend.")
    assert pronoun_slips(prompt, "He saw her friend.")


def test_names_need_a_capital_and_whole_words() -> None:
    """A longer name is another name, and a name starts with a capital letter."""
    assert keeps_name(ALICE, "Alice's hat.")
    assert not keeps_name(ALICE, "Alices hat.")
    assert not keeps_name(ALICE, "alice's hat.")


def test_things_may_be_plural() -> None:
    """The singular of a plural thing counts, and the reverse."""
    assert mentions_thing(ALICE, "Two grobbles.")
    assert not mentions_thing(ALICE, "A grobbler.")
    boxes, compass, glasses = (replace(ALICE, thing=thing) for thing in ("box", "compass", "glasses"))
    assert mentions_thing(boxes, "Two boxes.")
    assert mentions_thing(compass, "Her compass.")
    assert not mentions_thing(compass, "On the campus.")
    assert mentions_thing(glasses, "Her glasses.")


def test_sentences_are_counted_once_per_story() -> None:
    """A sentence that a story repeats counts once."""
    assert sentences('"Stop!" said Mia. Mia ran.') == ['"Stop!"', "said Mia.", "Mia ran."]
    assert frequent_sentences(["A b. A b.", "A b. C."])[0] == ("A b.", 2)


def test_report_has_all_figures() -> None:
    """The report counts each criterion over the prompts that have it."""
    unnamed = Prompt("a fox", "", "any", "", listed=False)
    text = report([Answer(ALICE, STORY, 40, ended=True), Answer(unnamed, "He saw her.", 9, ended=False)])
    assert "name kept: 1 of 1 (100.0%)" in text
    assert "stories with a pronoun slip: 1 of 2 (50.0%)" in text
    assert "ended within 256 tokens: 1 of 2 (50.0%)" in text
