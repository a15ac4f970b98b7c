"""Evaluate the demo model on unseen pairs of character and place: `python -m tools.demo_model.evaluate`."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import sentencepiece
import torch

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.sampling import GenerationParams, Sampler
from tools.demo_model.templates import with_article
from tools.demo_model.tokenizer import BOS, EOS, prompt_text
from tools.demo_model.train import CONTEXT_LENGTH, DEMO_DIRECTORY
from tools.demo_model.world import HEROES, PLACES, Place, held_out

MAX_TOKENS = 256
SEED = 7
Generate = Callable[[list[int]], list[int]]

_PHRASINGS = (
    "Tell me a story about {hero} who lives {where}.",
    "Tell me a story about {hero} {where}",
    "Write a short tale about {hero} {where}.",
    "can you tell me a story about {hero} who lives {where}?",
    "a bedtime story about {hero} {where} please",
    "I would like a funny story about {hero} {where}.",
    "Please write a story about {hero} who got lost {where}",
    "Make up a long story about {hero} {where}!",
)


@dataclass(frozen=True)
class Task:
    """One request, with the character and the place that the reply must name."""

    hero: str
    place: Place
    prompt: str


@dataclass(frozen=True)
class Answer:
    """One reply; `ended` is true if the model generated `</s>`."""

    task: Task
    text: str
    tokens: int
    ended: bool

    @property
    def on_topic(self) -> bool:
        """Whether the reply names both the requested character and the requested place."""
        return all(
            re.search(rf"\b{noun}\b", self.text, re.IGNORECASE) for noun in (self.task.hero, self.task.place.noun)
        )

    @property
    def repeats(self) -> bool:
        """Whether a sentence occurs three times."""
        return max(Counter(re.split(r"(?<=[.!?])\s+", self.text)).values()) >= 3


def tasks(count: int) -> list[Task]:
    """Return the first `count` requests of a fixed list in which every pair of character and place occurs once."""
    rng = Random(SEED)
    pairs = [(hero, place) for hero in HEROES for place in PLACES if held_out(hero, place)]
    return [
        Task(hero, place, rng.choice(_PHRASINGS).format(hero=with_article(hero), where=place.phrase))
        for hero, place in rng.sample(pairs, count)
    ]


def load(directory: Path, temperature: float) -> Generate:
    """Load the model as the service does, in float16; return a function from prompt ids to reply ids.

    A reply that ends by itself includes `</s>`. No other function here knows how the model runs.
    """
    torch.set_num_threads(1)
    model = load_model(directory, device="cpu", dtype=torch.float16, context_length=CONTEXT_LENGTH, slots=1)
    params = GenerationParams(MAX_TOKENS, temperature=temperature, seed=SEED)

    def generate(prompt: list[int]) -> list[int]:
        sampler = Sampler(params, prompt, model.vocab_size, model.device)
        reply = [sampler.sample(model.prefill(0, prompt, 0))]
        while reply[-1] != EOS and len(reply) < MAX_TOKENS:
            reply.append(sampler.sample(model.decode([0], [reply[-1]], [len(prompt) + len(reply) - 1])[0]))
        return reply

    return generate


def answer(task: Task, generate: Generate, tokenizer: sentencepiece.SentencePieceProcessor) -> Answer:
    """Generate the reply to a task, with Llama-2's template."""
    reply = generate([BOS, *tokenizer.encode(prompt_text(task.prompt))])
    ended = reply[-1] == EOS
    return Answer(task, tokenizer.decode(reply[:-1] if ended else reply), len(reply), ended)


def report(answers: list[Answer], seconds: float) -> str:
    """Return the figures, one per line."""
    count = len(answers)
    ended, on_topic = sum(a.ended for a in answers), sum(a.on_topic for a in answers)
    return "\n".join(
        (
            f"prompts with unseen pairs: {count}",
            f"replies that end within {MAX_TOKENS} tokens: {ended / count:.1%}",
            f"replies that name the character and the place: {on_topic / count:.1%}",
            f"replies that repeat a sentence three times: {sum(a.repeats for a in answers)}",
            f"mean length: {sum(a.tokens for a in answers) / count:.0f} tokens",
            f"distinct replies: {len({a.text for a in answers})}",
            f"time: {seconds:.0f} s",
        )
    )


def main() -> None:
    """Evaluate the model and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_DIRECTORY, help="directory of the model")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts")
    parser.add_argument("--samples", type=int, default=0, help="number of replies to print, in Markdown")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--failures", action="store_true", help="also print the replies that miss a criterion")
    arguments = parser.parse_args()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.model / "tokenizer.model"))
    generate = load(arguments.model, arguments.temperature)
    start = time.perf_counter()
    answers = [answer(task, generate, tokenizer) for task in tasks(arguments.prompts)]
    print(report(answers, time.perf_counter() - start))
    for a in answers[: arguments.samples]:
        print(f"\n> {a.task.prompt}\n\n{a.text}")
    if arguments.failures:
        for a in answers:
            if a.repeats or not (a.ended and a.on_topic):
                print(f"\nMISSED > {a.task.prompt}\n\n{a.text}")


if __name__ == "__main__":
    main()
