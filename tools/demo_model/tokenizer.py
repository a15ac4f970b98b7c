"""The demo model's SentencePiece tokenizer (Llama-2's settings, a small vocabulary), and conversations as token ids."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

Message = dict[str, str]
BOS, EOS = 1, 2
VOCAB_SIZE = 1024
"""Small, so that each piece is frequent and the model learns to copy words that it has never seen."""
IGNORED = -100
"""The label of a position that does not count in the loss."""


def train_tokenizer(texts: Iterable[str], path: Path) -> None:
    """Train on the texts and write the model.

    Training writes to a buffer, because a model that it writes to a path records that path.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        max_sentencepiece_length=16,
        character_coverage=0.99999,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def prompt_text(user: str, system: str = "") -> str:
    """Return the user's half of a turn in Llama-2's template."""
    instructions = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {instructions}{user.strip()} [/INST]"


def training_row(
    tokenizer: sentencepiece.SentencePieceProcessor, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a conversation; only the replies and their ends have labels.

    The template puts a space between a reply and `</s>`. A generated reply must end right after its last word.
    Therefore the label after the last word is `</s>`, and the label after the space is `</s>` again.
    """
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    ids: list[int] = []
    labels: list[int] = []
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        prompt = [BOS, *tokenizer.encode(prompt_text(user["content"], system))]
        reply = tokenizer.encode(assistant["content"].strip())
        space = tokenizer.encode(assistant["content"].strip() + " ")[len(reply) :]
        ids += [*prompt, *reply, *space, EOS]
        labels += [*[IGNORED] * len(prompt), *reply, *[EOS] * len(space), EOS]
        system = ""
    return ids, labels
