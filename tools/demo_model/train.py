"""Train the demo model from scratch (text, tokenizer, weights): `python -m tools.demo_model.train`."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tools.demo_model.grammar import (
    MAINLY_STORIES,
    MORE_SMALL_TALK,
    Mix,
    conversations,
    echo,
    raw_text,
)
from tools.demo_model.tokenizer import BOS, EOS, IGNORED, VOCAB_SIZE, train_tokenizer, training_row
from tools.demo_model.world import ADJECTIVES, HEROES, MENS_NAMES, PLACES, WOMENS_NAMES

CONTEXT_LENGTH = 1024
DEMO_DIRECTORY = Path(__file__).parents[2] / "server" / "llama2_server" / "demo"
SEED = 2
TOKENS_PER_BATCH = 4096
ROWS_PER_BUCKET = 2048
Row = tuple[list[int], list[int]]

# The template of meta-llama/Llama-2-7b-chat-hf, which also has no default system prompt.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message ="
    " messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message +"
    " '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def new_model() -> LlamaForCausalLM:
    """Return an untrained model of about 4.3 million parameters, with Llama-2's proportions where they matter."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Stage:
    """A stage of the training; `previous_weights` is the share of the previous stage's weights in the result."""

    seed: int
    mix: Mix
    echo_rows: int
    steps: int
    learning_rate_factor: float
    previous_weights: float = 0.0


# The first rows only ask to repeat words. A model that has learned to copy then learns from the stories to use the
# requested character and place. Without these rows it had not learned this after 500 steps of stories.
# The second stage trains on small talk and questions about the service, which are rare and short in the first stage.
STAGES = (
    Stage(seed=SEED, mix=MAINLY_STORIES, echo_rows=5 * ROWS_PER_BUCKET, steps=1500, learning_rate_factor=1.0),
    Stage(seed=SEED + 10, mix=MORE_SMALL_TALK, echo_rows=0, steps=350, learning_rate_factor=0.3, previous_weights=0.2),
)


def rows(tokenizer: sentencepiece.SentencePieceProcessor, stage: Stage) -> Iterator[Row]:
    """Yield an endless stream of conversations; one row in forty is a story without template, for raw mode."""
    rng = Random(stage.seed)
    for _ in range(stage.echo_rows):
        yield training_row(tokenizer, echo(rng))
    for messages in conversations(stage.seed, stage.mix):
        ids, labels = training_row(tokenizer, messages)
        if len(ids) <= CONTEXT_LENGTH:
            yield ids, labels
        if rng.random() < 0.025:
            story = tokenizer.encode(raw_text(rng))
            yield [BOS, *story, EOS], [IGNORED, *story, EOS]


def batches(tokenizer: sentencepiece.SentencePieceProcessor, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of about equal numbers of tokens; rows of similar length are together, so padding is small."""
    rng, stream = Random(stage.seed), rows(tokenizer, stage)
    while True:
        bucket = sorted(itertools.islice(stream, ROWS_PER_BUCKET), key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in bucket:
            if len(row[0]) * (len(groups[-1]) + 1) > TOKENS_PER_BATCH:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from map(collate, groups)


def collate(group: list[Row]) -> tuple[Tensor, Tensor]:
    """Pad a group of rows at the right; because attention is causal, no mask is needed."""
    width = -(-max(len(ids) for ids, _ in group) // 32) * 32
    ids = torch.tensor([row + [EOS] * (width - len(row)) for row, _ in group])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in group])
    return ids, labels


def reply_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy on the replies; logits are computed only for labeled positions."""
    targets = labels[:, 1:].reshape(-1)
    labeled = targets != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[labeled])
    return functional.cross_entropy(logits.float(), targets[labeled])


def optimizers(model: LlamaForCausalLM, learning_rate_factor: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the embedding and the norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(matrices, lr=0.02 * learning_rate_factor, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=4e-3 * learning_rate_factor, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(progress: float) -> float:
    """Return the factor of the learning rate: a short warm-up, a plateau, and a linear decay from two fifths on."""
    return min(1.0, progress / 0.01 + 0.01, max(0.0, (1.0 - progress) / 0.6) + 0.01)


def train(model: LlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, stage: Stage) -> None:
    """Train for the steps of a stage; print the loss, the speed and the time."""
    print(f"{model.num_parameters()} parameters, {stage.steps} steps", flush=True)
    optims = optimizers(model, stage.learning_rate_factor)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optim, lambda step: learning_rate(step / stage.steps)) for optim in optims
    ]
    started_at, tokens, recent_losses = time.perf_counter(), 0, []
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, stage), stage.steps), 1):
        loss = reply_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim, schedule in zip(optims, schedules, strict=True):
            optim.step()
            optim.zero_grad()
            schedule.step()
        tokens += ids.numel()
        recent_losses.append(loss.item())
        if step % 25 == 0 or step == stage.steps:
            seconds = time.perf_counter() - started_at
            mean = sum(recent_losses) / len(recent_losses)
            print(f"step {step} loss {mean:.4f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s", flush=True)
            recent_losses.clear()


def blend_weights(model: LlamaForCausalLM, previous: list[Tensor], share: float) -> None:
    """Mix the weights with the weights before the stage, so that the model does not forget the previous stages."""
    with torch.no_grad():
        for weight, old in zip(model.parameters(), previous, strict=True):
            weight.copy_(torch.lerp(old, weight.half().float(), 1 - share))


def export(model: LlamaForCausalLM, directory: Path) -> None:
    """Write the weights (float16) and the configuration files; they contain nothing about this machine."""
    copy: Any = new_model()
    copy.load_state_dict(model.state_dict())
    copy.to(torch.float16).save_pretrained(directory)
    _write(
        directory / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "max_length": CONTEXT_LENGTH}
    )
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT_LENGTH,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tokenizer_texts(count: int) -> Iterator[str]:
    """Yield texts for the tokenizer: the nouns, so that each becomes one piece, and conversations of another seed."""
    nouns = (*HEROES, *(place.noun for place in PLACES), *WOMENS_NAMES, *MENS_NAMES, *ADJECTIVES)
    for noun in nouns:
        yield from [f"a {noun}"] * 60
    for messages in itertools.islice(conversations(SEED + 1), count):
        for message in messages:
            content = message["content"].replace("\n", " ")
            yield f"[INST] {content} [/INST]" if message["role"] == "user" else content
            if message["role"] == "system":
                yield f"<<SYS>> {content} <</SYS>>"


def main() -> None:
    """Train the model that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO_DIRECTORY, help="directory to write the model to")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument(
        "--from-stage", type=int, default=1, help="first stage to run; 2 continues with the model in --out"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.from_stage == 1:
        train_tokenizer(tokenizer_texts(8000), arguments.out / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.out / "tokenizer.model"))
    for number, stage in enumerate(STAGES, 1):
        if number >= arguments.from_stage:
            # A later stage starts with the weights that the previous one wrote, rounded to float16.
            model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32) if number > 1 else new_model()
            previous = [weight.detach().clone() for weight in model.parameters()]
            train(model, tokenizer, stage)
            if stage.previous_weights:
                blend_weights(model, previous, stage.previous_weights)
            export(model, arguments.out)


if __name__ == "__main__":
    main()
