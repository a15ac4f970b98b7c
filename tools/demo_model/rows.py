"""Rows and batches of the training text; every bucket of rows depends on the seed and its number only."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from random import Random

import sentencepiece
import torch
from torch import Tensor

from tools.demo_model.corpus.grammar import LATE_MIX, Message, Mix, conversation, only_exercise, raw_text
from tools.demo_model.network import CONTEXT_LENGTH, Size
from tools.demo_model.tokenizer import BOS, EOS, IGNORED, training_row

SEED = 3
STEPS = 10_400
MAX_REPLY_TOKENS = 250
"""Longer replies are left out, so that every story ends within the card's default of 256 tokens."""
CUT_TOKENS = (32, 80)
"""Range of the number of reply tokens in a row that is cut; the opening and the sentence about the thing fit."""
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Recipe:
    """Numbers that the result depends on; `exercise_buckets` counts the first buckets, which have only exercises.

    A model that has learned to copy then learns from the stories to use the requested words. Without these rows it
    had not learned this after 500 steps of stories.

    A share of the rows, `cut_share`, ends soon after the start of the reply. The opening of a story has the name, the
    character, the thing and mostly a pronoun, so these rows teach more requests with the same number of tokens.

    From `late_bucket` on, more rows ask for the gender of names (LATE_MIX), and more rows are cut. From `late_step` on,
    the learning rate decays linearly until `steps`; before, it is that of a training of `planned_steps`.
    """

    size: Size = field(default_factory=Size)
    seed: int = SEED
    steps: int = STEPS
    planned_steps: int = 9000
    late_step: int = 6200
    late_bucket: int = 108
    exercise_buckets: int = 8
    cut_share: float = 0.6
    late_cut_share: float = 0.7
    rows_per_bucket: int = 2048
    tokens_per_batch: int = 6144
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 4e-3


@dataclass
class Position:
    """The next batch: its step, counted from 0, and its index in the stream of buckets."""

    step: int = 0
    bucket: int = 0
    batch: int = 0


def bucket_rows(tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, bucket: int) -> list[Row]:
    """Return the rows of a bucket, so that training can resume anywhere."""
    rng = Random(f"{recipe.seed} {bucket}")
    late = bucket >= recipe.late_bucket
    mix, cut_share = (LATE_MIX, recipe.late_cut_share) if late else (Mix(), recipe.cut_share)
    rows: list[Row] = []
    while len(rows) < recipe.rows_per_bucket:
        if bucket < recipe.exercise_buckets:
            rows.append(training_row(tokenizer, only_exercise(rng)))
        elif rng.random() < 0.02:
            story = tokenizer.encode(raw_text(rng))
            rows.append(([BOS, *story, EOS], [IGNORED, *story, EOS]))
        else:
            messages = conversation(rng, mix)
            row = training_row(tokenizer, messages)
            if len(row[0]) <= CONTEXT_LENGTH and _replies_are_short(tokenizer, messages):
                rows.append(cut(row, rng.randrange(*CUT_TOKENS)) if rng.random() < cut_share else row)
    return rows


def cut(row: Row, tokens: int) -> Row:
    """Return the row up to this number of tokens of its first reply."""
    ids, labels = row
    end = tokens + next(index for index, label in enumerate(labels) if label != IGNORED)
    return ids[:end], labels[:end]


def _replies_are_short(tokenizer: sentencepiece.SentencePieceProcessor, messages: list[Message]) -> bool:
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    return max(map(len, tokenizer.encode(replies))) <= MAX_REPLY_TOKENS


def bucket_groups(tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, bucket: int) -> list[list[Row]]:
    """Return groups of about equal numbers of tokens; rows of similar length are together, so padding is small."""
    rows = sorted(bucket_rows(tokenizer, recipe, bucket), key=lambda row: len(row[0]))
    groups: list[list[Row]] = [[]]
    for row in rows:
        if _width(row) * (len(groups[-1]) + 1) > recipe.tokens_per_batch:
            groups.append([])
        groups[-1].append(row)
    Random(f"{recipe.seed} {bucket} order").shuffle(groups)
    return groups


def _width(row: Row) -> int:
    return -(-len(row[0]) // 16) * 16


def collate(group: list[Row]) -> tuple[Tensor, Tensor]:
    """Pad a group of rows at the right; because attention is causal, no mask is needed."""
    width = max(map(_width, group)) + 1
    ids = torch.tensor([row + [EOS] * (width - len(row)) for row, _ in group])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in group])
    return ids, labels


def batches(
    tokenizer: sentencepiece.SentencePieceProcessor,
    recipe: Recipe,
    position: Position,
    executor: Executor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
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
