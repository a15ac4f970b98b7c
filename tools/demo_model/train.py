"""Train the demo model from scratch (text, tokenizer, weights): `python -m tools.demo_model.train`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from tools.demo_model.corpus.grammar import Message, Mix, conversation, echo, raw_text
from tools.demo_model.export import DEMO_DIRECTORY, export
from tools.demo_model.network import CONTEXT_LENGTH, Network, Size
from tools.demo_model.tokenizer import BOS, EOS, IGNORED, train_tokenizer, training_row

SEED = 3
STEPS = 4400
TOKENS_PER_BATCH = 6144
ROWS_PER_BUCKET = 2048
MAX_REPLY_TOKENS = 250
"""Longer replies are left out, so that every story ends within the card's default of 256 tokens."""
SAVE_SECONDS = 120
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Recipe:
    """Numbers that the result depends on; `echo_buckets` counts the first buckets, which only ask to repeat words.

    A model that has learned to copy then learns from the stories to use the requested words. Without these rows it
    had not learned this after 500 steps of stories.
    """

    size: Size = field(default_factory=Size)
    seed: int = SEED
    steps: int = STEPS
    echo_buckets: int = 8
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 4e-3


@dataclass
class Position:
    """The next batch: its step, counted from 0, and its index in the stream of buckets."""

    step: int = 0
    bucket: int = 0
    batch: int = 0


def bucket_rows(tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, bucket: int) -> list[Row]:
    """Return the rows of a bucket; it depends on the seed and its number only, so training can resume anywhere."""
    rng = Random(f"{recipe.seed} {bucket}")
    rows: list[Row] = []
    while len(rows) < ROWS_PER_BUCKET:
        if bucket < recipe.echo_buckets:
            rows.append(training_row(tokenizer, echo(rng)))
        elif rng.random() < 0.02:
            story = tokenizer.encode(raw_text(rng))
            rows.append(([BOS, *story, EOS], [IGNORED, *story, EOS]))
        else:
            messages = conversation(rng, Mix())
            row = training_row(tokenizer, messages)
            if len(row[0]) <= CONTEXT_LENGTH and _replies_are_short(tokenizer, messages):
                rows.append(row)
    return rows


def _replies_are_short(tokenizer: sentencepiece.SentencePieceProcessor, messages: list[Message]) -> bool:
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    return max(map(len, tokenizer.encode(replies))) <= MAX_REPLY_TOKENS


def bucket_batches(
    tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, bucket: int
) -> list[tuple[Tensor, Tensor]]:
    """Return batches of about equal numbers of tokens; rows of similar length are together, so padding is small."""
    rows = sorted(bucket_rows(tokenizer, recipe, bucket), key=lambda row: len(row[0]))
    groups: list[list[Row]] = [[]]
    for row in rows:
        if _width(row) * (len(groups[-1]) + 1) > TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(row)
    Random(f"{recipe.seed} {bucket} order").shuffle(groups)
    return [collate(group) for group in groups]


def _width(row: Row) -> int:
    return -(-len(row[0]) // 16) * 16


def collate(group: list[Row]) -> tuple[Tensor, Tensor]:
    """Pad a group of rows at the right; because attention is causal, no mask is needed."""
    width = max(map(_width, group)) + 1
    ids = torch.tensor([row + [EOS] * (width - len(row)) for row, _ in group])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in group])
    return ids, labels


def batches(
    tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, position: Position
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches from the position on, and move the position past each batch before it is yielded."""
    while True:
        bucket = bucket_batches(tokenizer, recipe, position.bucket)
        for ids, labels in bucket[position.batch :]:
            position.batch, position.step = position.batch + 1, position.step + 1
            yield ids, labels
        position.bucket, position.batch = position.bucket + 1, 0


def optimizers(network: Network, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the embedding and the norms."""
    matrices = [weight for weight in network.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in network.parameters() if id(weight) not in inside]
    muon, adam = recipe.matrix_learning_rate, recipe.other_learning_rate
    return [
        torch.optim.Muon(matrices, lr=muon, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate(progress: float) -> float:
    """Return the factor of the learning rate: a short warm-up, a plateau, and a linear decay from two fifths on."""
    return min(1.0, progress / 0.005 + 0.01, max(0.0, (1.0 - progress) / 0.6) + 0.002)


class Training:
    """A training that writes its complete state to a file and resumes from it with the same result to the bit."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, recipe: Recipe, state: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.tokenizer, self.recipe, self.state = tokenizer, recipe, state
        self.network, self.position = Network(recipe.size), Position()
        self.optimizers = optimizers(self.network, recipe)
        self._rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        if state.exists():
            saved: dict[str, Any] = torch.load(state, weights_only=True)
            self.network.load_state_dict(saved["network"])
            self.position = Position(*saved["position"])
            for optimizer, content in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(content)

    def save(self) -> None:
        """Replace the state file; a crash leaves the old or the new one."""
        position = self.position
        content = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "position": (position.step, position.bucket, position.batch),
        }
        torch.save(content, self.state.with_suffix(".new"))
        os.replace(self.state.with_suffix(".new"), self.state)

    def run(self, until: int) -> None:
        """Train until the number of steps; print the loss and the CPU time, and save every few minutes."""
        saved_at, started_at, tokens, losses = time.monotonic(), time.process_time(), 0, []
        for ids, labels in batches(self.tokenizer, self.recipe, self.position):
            losses.append(self._step(ids, labels))
            tokens += ids.numel()
            step = self.position.step
            if step % 25 == 0 or step >= until:
                seconds = time.process_time() - started_at
                mean = sum(losses) / len(losses)
                print(f"step {step} loss {mean:.4f} {tokens / seconds:.0f} tokens per CPU second", flush=True)
                losses.clear()
            if step >= until or time.monotonic() - saved_at > SAVE_SECONDS:
                self.save()
                saved_at = time.monotonic()
            if step >= until:
                return

    def _step(self, ids: Tensor, labels: Tensor) -> float:
        factor = learning_rate((self.position.step - 1) / self.recipe.steps)
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * factor
        loss = self.network.loss(ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()


def tokenizer_texts(count: int) -> Iterator[str]:
    """Yield texts for the tokenizer: conversations of another seed."""
    rng = Random(f"{SEED} tokenizer")
    for _ in range(count):
        for message in conversation(rng, Mix()):
            content = message["content"].replace("\n", " ")
            yield f"[INST] {content} [/INST]" if message["role"] == "user" else content
            if message["role"] == "system":
                yield f"<<SYS>> {content} <</SYS>>"


def main() -> None:
    """Train the model, or go on with a training that was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO_DIRECTORY, help="directory to write the model to")
    parser.add_argument("--state", type=Path, default=Path(".demo_model.state"), help="file to resume from")
    parser.add_argument("--until", type=int, default=STEPS, help="stop after this many steps, to look at the model")
    arguments = parser.parse_args()
    # The result depends on the order of additions, so the number of threads is part of the recipe.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.state.exists():
        train_tokenizer(tokenizer_texts(8000), arguments.out / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.out / "tokenizer.model"))
    training = Training(tokenizer, Recipe(), arguments.state)
    print(f"{sum(weight.numel() for weight in training.network.parameters())} parameters, {STEPS} steps", flush=True)
    training.run(arguments.until)
    export(training.network, arguments.out)
    if training.position.step >= STEPS:
        arguments.state.unlink()


if __name__ == "__main__":
    main()
