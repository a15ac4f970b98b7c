"""Measure the demo model on prompts that training never saw: `python -m tools.demo_model.evaluate`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.sampling import GenerationParams, Sampler
from tools.demo_model.export import DEMO_DIRECTORY
from tools.demo_model.measures import (
    frequent_sentences,
    keeps_name,
    mentions_thing,
    non_words,
    pronoun_slips,
)
from tools.demo_model.network import CONTEXT_LENGTH
from tools.demo_model.prompts import ANY, PARTS, Prompt, prompts
from tools.demo_model.tokenizer import BOS, EOS, prompt_text

MAX_TOKENS = 256
SEED = 7
TEMPERATURES = {"greedy": 0.0, "sampled": 0.5}
"""0.5 and a top_p of 0.9 are the defaults of the demo model's card."""
Generate = Callable[[list[int], int], list[int]]


@dataclass(frozen=True)
class Answer:
    """One reply; `ended` is true if the model generated `</s>`."""

    prompt: Prompt
    text: str
    tokens: int
    ended: bool


def load(directory: Path, temperature: float) -> Generate:
    """Load the model as the service does, in float16; return a function from prompt ids and a seed to reply ids.

    A reply that ends by itself includes `</s>`. No other function here knows how the model runs.
    """
    torch.set_num_threads(1)
    model = load_model(directory, device="cpu", dtype=torch.float16, context_length=CONTEXT_LENGTH, slots=1)

    def generate(prompt: list[int], seed: int) -> list[int]:
        params = GenerationParams(MAX_TOKENS, temperature=temperature, top_p=0.9, seed=seed)
        sampler = Sampler(params, prompt, model.vocab_size, model.device)
        reply = [sampler.sample(model.prefill(0, prompt, 0))]
        while reply[-1] != EOS and len(reply) < MAX_TOKENS:
            reply.append(sampler.sample(model.decode([0], [reply[-1]], [len(prompt) + len(reply) - 1])[0]))
        return reply

    return generate


def answer(prompt: Prompt, generate: Generate, tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> Answer:
    """Generate the reply to a prompt, with Llama-2's template."""
    reply = generate([BOS, *tokenizer.encode(prompt_text(prompt.text))], seed)
    ended = reply[-1] == EOS
    return Answer(prompt, tokenizer.decode(reply[:-1] if ended else reply), len(reply), ended)


def failures(a: Answer) -> list[str]:
    """Return the criteria that a reply misses."""
    prompt, text = a.prompt, a.text
    missed = {
        f"non-word {' '.join(non_words(prompt, text))}": bool(non_words(prompt, text)),
        "pronoun": pronoun_slips(prompt, text),
        "name": bool(prompt.name) and not keeps_name(prompt, text),
        "thing": bool(prompt.thing) and not mentions_thing(prompt, text),
        "no end": not a.ended,
    }
    return [criterion for criterion, is_missed in missed.items() if is_missed]


def report(answers: Sequence[Answer]) -> str:
    """Return the figures, one per line."""
    named = [a for a in answers if a.prompt.name]
    gendered = [a for a in answers if a.prompt.pronoun != ANY]
    listed, other = ([a for a in named if a.prompt.listed is is_listed] for is_listed in (True, False))
    things = [a for a in answers if a.prompt.thing]
    sentence, most = frequent_sentences(a.text for a in answers)[0]
    return "\n".join(
        (
            _figure("stories with a non-word", answers, lambda a: bool(non_words(a.prompt, a.text))),
            _figure("stories with a pronoun slip", answers, lambda a: pronoun_slips(a.prompt, a.text)),
            _figure("  of these where the prompt says the gender", gendered, lambda a: pronoun_slips(a.prompt, a.text)),
            _figure("name kept", named, lambda a: keeps_name(a.prompt, a.text)),
            _figure("  names in the lists", listed, lambda a: keeps_name(a.prompt, a.text)),
            _figure("  other and invented names", other, lambda a: keeps_name(a.prompt, a.text)),
            _figure("thing mentioned", things, lambda a: mentions_thing(a.prompt, a.text)),
            _figure("ended within 256 tokens", answers, lambda a: a.ended),
            f"most frequent sentence: {most / len(answers):.1%} ({sentence})",
            f"distinct replies: {len({a.text for a in answers})}",
            f"mean length: {sum(a.tokens for a in answers) / len(answers):.0f} tokens",
        )
    )


def _figure(title: str, answers: Sequence[Answer], holds: Callable[[Answer], bool]) -> str:
    count = sum(map(holds, answers))
    return f"{title}: {count} of {len(answers)} ({count / max(1, len(answers)):.1%})"


def main() -> None:
    """Evaluate the model and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_DIRECTORY, help="directory of the model")
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="part of the prompts; final is for one run")
    parser.add_argument("--mode", choices=tuple(TEMPERATURES), default="greedy", help="greedy, or the card's defaults")
    parser.add_argument("--every", type=int, default=1, help="use only every n-th prompt")
    parser.add_argument("--samples", type=int, default=0, help="number of replies to print, in Markdown")
    parser.add_argument("--failures", action="store_true", help="also print the replies that miss a criterion")
    arguments = parser.parse_args()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.model / "tokenizer.model"))
    generate = load(arguments.model, TEMPERATURES[arguments.mode])
    start = time.perf_counter()
    chosen = prompts(arguments.part)[:: arguments.every]
    answers = [answer(prompt, generate, tokenizer, SEED + index) for index, prompt in enumerate(chosen)]
    print(f"{arguments.mode}, {arguments.part}, {len(answers)} prompts, {time.perf_counter() - start:.0f} s")
    print(report(answers))
    for a in answers[:: max(1, len(answers) // max(1, arguments.samples))][: arguments.samples]:
        print(f"\n> {a.prompt.text}\n\n{a.text}")
    if arguments.failures:
        for a in answers:
            if missed := failures(a):
                print(f"\nMISSED {', '.join(missed)} > {a.prompt.text}\n\n{a.text}")


if __name__ == "__main__":
    main()
