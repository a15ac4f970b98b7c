"""Rows and batches of the training text; every bucket of rows depends on the seed and its number only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor

from tools.demo_model.corpus.choices import by_one_letter
from tools.demo_model.corpus.grammar import (
    COMPOSED_MIX,
    LAST_MIX,
    LATE_MIX,
    Message,
    Mix,
    conversation,
    only_exercise,
    raw_text,
)
from tools.demo_model.network import CONTEXT_LENGTH, Size
from tools.demo_model.tokenizer import BOS, EOS, IGNORED, training_row

SEED = 3
MAX_REPLY_TOKENS = 250
"""Longer replies are left out, so that every story ends within the card's default of 256 tokens."""
CUT_TOKENS = (32, 80)
"""Range of the number of reply tokens in a row that is cut; the opening and the sentence about the thing fit."""
COPY_WEIGHT = 4.0
"""Weight in the loss of a word that the reply shares with the request, or that says a gender; other words have 1."""
_GENDERED = frozenset(["he", "him", "his", "himself", "she", "her", "hers", "herself", "boy", "girl", "man", "woman"])
_WORD_START = "▁"
_QUOTED = ".,:;?!\"'()"


class Row(NamedTuple):
    """A conversation: token ids, labels (IGNORED where there is none), and the weight of each label in the loss."""

    ids: list[int]
    labels: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Part:
    """The rows of one part of the training: the mix of conversations, the share of the rows that are cut, and more."""

    mix: Mix
    cut_share: float
    copy_weight: float = 1.0
    by_one_letter: bool = False


@dataclass(frozen=True)
class Refinement:
    """A part that starts from the weights as they would be exported, without the history of the optimizers.

    Its learning rate decays linearly from the share `rate`.
    """

    part: Part
    steps: int
    rate: float


_FIRST, _LATE = Part(Mix(), 0.6), Part(LATE_MIX, 0.7)
REFINEMENTS = (
    Refinement(Part(COMPOSED_MIX, 0.85, COPY_WEIGHT), steps=5000, rate=0.4),
    Refinement(Part(LAST_MIX, 0.8, COPY_WEIGHT, by_one_letter=True), steps=2800, rate=0.35),
)
BUCKETS_PER_PART = 1000
"""A refinement has its own thousand of bucket numbers, so it does not depend on how many the parts before used."""


@dataclass(frozen=True)
class Recipe:
    """Numbers that the result depends on; `exercise_buckets` counts the first buckets, which have only exercises.

    A model that has learned to copy then learns from the stories to use the requested words. Without these rows it
    had not learned this after 500 steps of stories.

    A share of the rows ends soon after the start of the reply. The opening of a story has the name, the character, the
    thing and mostly a pronoun, so these rows teach more requests with the same number of tokens.

    From `late_bucket` on, more rows ask for the gender of names (LATE_MIX), and more rows are cut. From `late_step` on,
    the learning rate decays linearly until `steps`; before, it is that of a training of `planned_steps`. Then the
    refinements follow.
    """

    size: Size = field(default_factory=Size)
    seed: int = SEED
    steps: int = 10_400
    planned_steps: int = 9000
    late_step: int = 6200
    late_bucket: int = 108
    exercise_buckets: int = 8
    rows_per_bucket: int = 2048
    tokens_per_batch: int = 6144
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 4e-3
    refinements: tuple[Refinement, ...] = REFINEMENTS

    def starts(self) -> list[int]:
        """Return the step at which each part starts, and the number of all steps."""
        return list(itertools.accumulate((refinement.steps for refinement in self.refinements), initial=self.steps))

    def part(self, bucket: int) -> Part:
        """Return what the rows of a bucket are."""
        index = bucket // BUCKETS_PER_PART
        if index:
            return self.refinements[index - 1].part
        return _LATE if bucket >= self.late_bucket else _FIRST


@dataclass
class Position:
    """The next batch: its step, counted from 0, and its index in the stream of buckets."""

    step: int = 0
    bucket: int = 0
    batch: int = 0


def bucket_rows(tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, bucket: int) -> list[Row]:
    """Return the rows of a bucket, so that training can resume anywhere."""
    with by_one_letter(recipe.part(bucket).by_one_letter):
        return _bucket_rows(tokenizer, recipe, bucket)


def _bucket_rows(tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, bucket: int) -> list[Row]:
    rng, part = Random(f"{recipe.seed} {bucket}"), recipe.part(bucket)
    rows: list[Row] = []
    while len(rows) < recipe.rows_per_bucket:
        if bucket < recipe.exercise_buckets:
            rows.append(_row(tokenizer, only_exercise(rng), part))
        elif rng.random() < 0.02:
            story = tokenizer.encode(raw_text(rng))
            rows.append(Row([BOS, *story, EOS], [IGNORED, *story, EOS], [1.0] * (len(story) + 2)))
        else:
            messages = conversation(rng, part.mix)
            row = _row(tokenizer, messages, part)
            if len(row.ids) <= CONTEXT_LENGTH and _replies_are_short(tokenizer, messages):
                rows.append(cut(row, rng.randrange(*CUT_TOKENS)) if rng.random() < part.cut_share else row)
    return rows


def _row(tokenizer: sentencepiece.SentencePieceProcessor, messages: list[Message], part: Part) -> Row:
    ids, labels = training_row(tokenizer, messages)
    if part.copy_weight == 1.0:
        return Row(ids, labels, [1.0] * len(ids))
    return Row(ids, labels, copy_weights(tokenizer.id_to_piece(ids), labels, part.copy_weight))


def copy_weights(pieces: list[str], labels: list[int], weight: float) -> list[float]:
    """Return the weights of a conversation's labels: `weight` in a word of the prompts or one that says a gender."""
    weights = [1.0] * len(pieces)
    starts = [index for index, piece in enumerate(pieces) if piece.startswith(_WORD_START)]
    asked: set[str] = set(_GENDERED)
    for start, end in itertools.pairwise([*starts, len(pieces)]):
        word = "".join(pieces[start:end]).strip(_WORD_START).lower().removesuffix("'s").strip(_QUOTED)
        word = word.removesuffix("'s")
        if labels[start] == IGNORED:
            asked.add(word)
        elif word in asked:
            weights[start:end] = [weight] * (end - start)
    return weights


def cut(row: Row, tokens: int) -> Row:
    """Return the row up to this number of tokens of its first reply."""
    end = tokens + next(index for index, label in enumerate(row.labels) if label != IGNORED)
    return Row(row.ids[:end], row.labels[:end], row.weights[:end])


def _replies_are_short(tokenizer: sentencepiece.SentencePieceProcessor, messages: list[Message]) -> bool:
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    return max(map(len, tokenizer.encode(replies))) <= MAX_REPLY_TOKENS


def bucket_groups(tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, bucket: int) -> list[list[Row]]:
    """Return groups of about equal numbers of tokens; rows of similar length are together, so padding is small."""
    rows = sorted(bucket_rows(tokenizer, recipe, bucket), key=lambda row: len(row.ids))
    groups: list[list[Row]] = [[]]
    for row in rows:
        if _width(row) * (len(groups[-1]) + 1) > recipe.tokens_per_batch:
            groups.append([])
        groups[-1].append(row)
    Random(f"{recipe.seed} {bucket} order").shuffle(groups)
    return groups


def _width(row: Row) -> int:
    return -(-len(row.ids) // 16) * 16


def collate(group: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad a group of rows at the right; because attention is causal, no mask is needed."""
    width = max(map(_width, group)) + 1
    pad = [width - len(row.ids) for row in group]
    ids = torch.tensor([row.ids + [EOS] * count for row, count in zip(group, pad, strict=True)])
    labels = torch.tensor([row.labels + [IGNORED] * count for row, count in zip(group, pad, strict=True)])
    weights = torch.tensor([row.weights + [1.0] * count for row, count in zip(group, pad, strict=True)])
    return ids, labels, weights


def batches(
    tokenizer: sentencepiece.SentencePieceProcessor,
    recipe: Recipe,
    position: Position,
    executor: Executor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the batches from the position on, and move the position past each batch before it is yielded.

    An executor makes the next bucket while this one is in use.
    """
    ahead = executor and executor.submit(bucket_groups, tokenizer, recipe, position.bucket)
    while True:
        groups = ahead.result() if ahead else bucket_groups(tokenizer, recipe, position.bucket)
        ahead = executor and executor.submit(bucket_groups, tokenizer, recipe, position.bucket + 1)
        for group in groups[position.batch :]:
            position.batch, position.step = position.batch + 1, position.step + 1
            yield collate(group)
        position.bucket, position.batch = position.bucket + 1, 0
