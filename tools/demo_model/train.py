"""Train the demo model from scratch (text, tokenizer, weights): `python -m tools.demo_model.train`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.demo_model.corpus.grammar import Mix, conversation
from tools.demo_model.export import DEMO_DIRECTORY, export
from tools.demo_model.network import Network
from tools.demo_model.rows import BUCKETS_PER_PART, SEED, Position, Recipe, batches
from tools.demo_model.tokenizer import BOS, EOS, train_tokenizer

STEPS = Recipe().starts()[-1]
THREADS = 2
"""The result depends on the order of additions, so the number of threads is part of the recipe."""
SAVE_SECONDS = 120


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


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the factor of the learning rate: warm-up, plateau, linear decay, a slower decay; and again at the end."""
    progress = min(step, recipe.late_step) / recipe.planned_steps
    factor = min(1.0, progress / 0.005 + 0.01, max(0.0, (1.0 - progress) / 0.6) + 0.002)
    starts = zip(recipe.starts(), recipe.refinements, strict=False)
    for start, refinement in reversed([*starts]):
        if step >= start:
            done = (step - start) / refinement.steps
            return refinement.rate * min(1.0, done / 0.01 + 0.01) * (1.0 - done)
    if step <= recipe.late_step:
        return factor
    return factor * (recipe.steps - step) / (recipe.steps - recipe.late_step)


class Training:
    """A training that writes its complete state to a file and resumes from it with the same result to the bit.

    An executor makes the rows in another process.
    """

    def __init__(
        self,
        tokenizer: sentencepiece.SentencePieceProcessor,
        recipe: Recipe,
        state: Path,
        executor: Executor | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self._executor = executor
        self.tokenizer, self.recipe, self.state = tokenizer, recipe, state
        self.network, self.position = Network(recipe.size), Position()
        self._new_optimizers()
        if state.exists():
            saved: dict[str, Any] = torch.load(state, weights_only=True)
            self.network.load_state_dict(saved["network"])
            self.position = Position(*saved["position"])
            for optimizer, content in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(content)

    def _new_optimizers(self) -> None:
        self.optimizers = optimizers(self.network, self.recipe)
        self._rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def refine(self, index: int) -> None:
        """Go to the start of a refinement, counted from 0, with the weights as they would be exported."""
        with torch.no_grad():
            for weight in self.network.parameters():
                weight.copy_(weight.bfloat16().half())
        self._new_optimizers()
        self.position = Position(self.recipe.starts()[index], (index + 1) * BUCKETS_PER_PART)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the layers, which makes a step faster, for batches of any shape.

        The first batch has the same shape in each process, so that a resumed training runs the same code.
        """
        for layer in self.network.layers:
            layer.compile(dynamic=True, backend=backend)
        ids = torch.full((3, 81), EOS)
        ids[:, 0] = BOS
        self.network.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
        self.network.zero_grad()

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
        """Train until the number of steps; print the loss and the speed, and save every few minutes."""
        for index, end in enumerate(self.recipe.starts()):
            if index and self.position.step == self.recipe.starts()[index - 1] < until:
                self.refine(index - 1)
            if self.position.step < min(until, end):
                self._run(min(until, end))

    def _run(self, until: int) -> None:
        started_at = saved_at = time.monotonic()
        tokens, losses = 0, []
        for ids, labels, weights in batches(self.tokenizer, self.recipe, self.position, self._executor):
            losses.append(self._step(ids, labels, weights if self.position.step > self.recipe.steps else None))
            tokens += ids.numel()
            step = self.position.step
            if step % 25 == 0 or step >= until:
                seconds = time.monotonic() - started_at
                mean = sum(losses) / len(losses)
                print(f"step {step} loss {mean:.4f} {tokens / seconds:.0f} tokens per second", flush=True)
                losses.clear()
            if step >= until or time.monotonic() - saved_at > SAVE_SECONDS:
                self.save()
                saved_at = time.monotonic()
            if step >= until:
                return

    def _step(self, ids: Tensor, labels: Tensor, weights: Tensor | None) -> float:
        factor = learning_rate(self.position.step - 1, self.recipe)
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * factor
        loss = self.network.loss(ids, labels, weights)
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
    parser.add_argument("--weights", type=Path, help="start the last refinement from the model in this directory")
    parser.add_argument("--until", type=int, default=STEPS, help="stop after this many steps, to look at the model")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.weights and not arguments.state.exists():
        shutil.copy(arguments.weights / "tokenizer.model", arguments.out / "tokenizer.model")
    elif not arguments.state.exists():
        train_tokenizer(tokenizer_texts(8000), arguments.out / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.out / "tokenizer.model"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        training = Training(tokenizer, Recipe(), arguments.state, executor)
        if arguments.weights and training.position.step == 0:
            training.network.load_checkpoint(load_file(arguments.weights / "model.safetensors"))
            training.refine(len(training.recipe.refinements) - 1)
        training.compile()
        size = sum(weight.numel() for weight in training.network.parameters())
        print(f"{size} parameters, {STEPS} steps", flush=True)
        training.run(arguments.until)
    export(training.network, arguments.out)
    if training.position.step >= STEPS:
        arguments.state.unlink()


if __name__ == "__main__":
    main()
