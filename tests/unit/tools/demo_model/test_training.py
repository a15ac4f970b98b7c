"""The training of the demo model, with a network that trains in seconds."""

from __future__ import annotations

import itertools
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from tools.demo_model.export import DEMO_DIRECTORY, configuration, export
from tools.demo_model.network import Network, Size
from tools.demo_model.rows import (
    BUCKETS_PER_PART,
    REFINEMENTS,
    Position,
    Recipe,
    Row,
    batches,
    bucket_rows,
    copy_weights,
    cut,
)
from tools.demo_model.tokenizer import BOS, EOS, IGNORED, training_row
from tools.demo_model.train import Training, learning_rate
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_server.engine.checkpoint.loader import load_model

SMALL = Size(hidden=32, inner=48, layers=2, heads=2)
RECIPE = Recipe(size=SMALL, steps=4, exercise_buckets=1, rows_per_bucket=64, tokens_per_batch=2048)
REFINED = replace(RECIPE, steps=2, refinements=tuple(replace(refinement, steps=2) for refinement in REFINEMENTS))
"""Two steps of the first part and of each refinement."""


@cache
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    """Return the shipped tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO_DIRECTORY / "tokenizer.model"))


def test_only_replies_have_labels() -> None:
    """The labels are the replies and their ends; the label after the last word is the end."""
    ids, labels = training_row(
        tokenizer(), [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho!"}]
    )
    reply = tokenizer().encode("Ho!")
    assert [label for label in labels if label != IGNORED] == [*reply, EOS, EOS]
    assert ids[-1] == EOS


def test_training_resumes_to_the_bit(tmp_path: Path) -> None:
    """A training that is interrupted in the middle of a bucket ends with the weights of an uninterrupted one."""
    whole = Training(tokenizer(), RECIPE, tmp_path / "whole.pt")
    whole.run(4)
    Training(tokenizer(), RECIPE, tmp_path / "parts.pt").run(1)
    parts = Training(tokenizer(), RECIPE, tmp_path / "parts.pt")
    assert parts.position == Position(step=1, bucket=0, batch=1)
    parts.run(4)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, parts.network.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_run_the_same_code_for_all_shapes(tmp_path: Path) -> None:
    """Batches of other shapes compile nothing, so a resumed training runs the code of an uninterrupted one."""
    training = Training(tokenizer(), RECIPE, tmp_path / "state.pt")
    ids = torch.randint(3, SMALL.vocab, (2, 17))
    expected = training.network.loss(ids, ids)
    training.compile("eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((7, 33), (2, 17), (32, 65)):
            other = torch.randint(3, SMALL.vocab, shape)
            training.network.loss(other, other).backward()  # type: ignore[no-untyped-call]
        assert torch.equal(training.network.loss(ids, ids), expected)


def test_batches_depend_on_the_position_only() -> None:
    """The batches from a position on are the batches that follow it in the stream from the start."""
    position = Position()
    stream = batches(tokenizer(), RECIPE, position)
    for _ in range(3):
        next(stream)
    copy = Position(position.step, position.bucket, position.batch)
    expected, found = next(stream), next(batches(tokenizer(), RECIPE, copy))
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])


def test_batches_of_an_executor_are_the_same() -> None:
    """An executor that makes the buckets ahead changes nothing."""
    with ThreadPoolExecutor(1) as executor:
        for expected, found in itertools.islice(
            zip(
                batches(tokenizer(), RECIPE, Position()),
                batches(tokenizer(), RECIPE, Position(), executor),
                strict=False,
            ),
            12,
        ):
            assert torch.equal(expected[0], found[0])
            assert torch.equal(expected[1], found[1])


def test_cut_rows_end_inside_the_reply() -> None:
    """A cut row has the whole request and the first tokens of the reply, without an end."""
    ids, labels = [BOS, 5, 6, 7, 8, 9, EOS], [IGNORED, IGNORED, IGNORED, 7, 8, 9, EOS]
    row = Row(ids, labels, [1.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0])
    assert cut(row, 2) == (ids[:5], labels[:5], row.weights[:5])
    assert cut(row, 40) == row


def test_words_of_the_request_and_genders_weigh_more() -> None:
    """In a reply, all pieces of a word that the request has, and of a word that says a gender, have the weight."""
    messages = [
        {"role": "user", "content": "a story about bartholomew's harp"},
        {"role": "assistant", "content": "Once Bartholomew lost her harp. He wept."},
    ]
    ids, labels = training_row(tokenizer(), messages)
    weights = copy_weights(tokenizer().id_to_piece(ids), labels, 4.0)
    heavy = "".join(
        piece if weight == 4.0 else "~" for piece, weight in zip(tokenizer().id_to_piece(ids), weights, strict=True)
    )
    assert re.sub("~+", "~", heavy) == "~▁Bartholomew~▁her▁harp.▁He~"
    assert {weight for weight, label in zip(weights, labels, strict=True) if label == IGNORED} == {1.0}


def test_heavy_labels_count_more_in_the_loss() -> None:
    """A weight of 3 is the same as three copies of the row in the mean over the labels."""
    torch.manual_seed(3)
    network, ids = Network(SMALL), torch.randint(3, SMALL.vocab, (2, 9))
    weights = torch.ones(2, 9)
    weights[1] = 3.0
    copies = ids[[0, 1, 1, 1]]
    torch.testing.assert_close(network.loss(ids, ids, weights), network.loss(copies, copies), rtol=1e-2, atol=1e-3)
    assert not torch.isclose(network.loss(ids, ids, weights), network.loss(ids, ids))


def test_last_refinement_starts_from_the_exported_weights(tmp_path: Path) -> None:
    """The end of a training from the start is that of a training from the model that the parts before export."""
    last = len(REFINED.refinements) - 1
    start, end = REFINED.starts()[-2:]
    whole = Training(tokenizer(), REFINED, tmp_path / "whole.pt")
    whole.run(start)
    export(whole.network, tmp_path)
    whole.run(end)
    assert whole.position.step == end
    assert whole.position.bucket == (last + 1) * BUCKETS_PER_PART
    refined = Training(tokenizer(), REFINED, tmp_path / "refined.pt")
    refined.network.load_checkpoint(load_file(tmp_path / "model.safetensors"))
    refined.refine(last)
    refined.run(end)
    assert refined.position == whole.position
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, refined.network.state_dict()[name]), name


def test_refinements_resume_to_the_bit(tmp_path: Path) -> None:
    """A training that is interrupted at each step, also between two parts, ends with the same weights."""
    end = REFINED.starts()[-1]
    whole = Training(tokenizer(), REFINED, tmp_path / "whole.pt")
    whole.run(end)
    for until in range(1, end + 1):
        parts = Training(tokenizer(), REFINED, tmp_path / "parts.pt")
        assert parts.position.step == until - 1
        parts.run(until)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, parts.network.state_dict()[name]), name


def test_rows_of_refinements_have_weights() -> None:
    """Before the refinements all labels weigh the same; in them, some weigh more."""
    first, refined = (bucket_rows(tokenizer(), REFINED, bucket) for bucket in (1, BUCKETS_PER_PART))
    assert {weight for row in first for weight in row.weights} == {1.0}
    assert {weight for row in refined for weight in row.weights} == {1.0, 4.0}


def test_network_is_llama() -> None:
    """The network gives the hidden states of transformers' Llama with the same weights."""
    torch.manual_seed(5)
    network = Network(SMALL)
    weights = {name: weight.float() for name, weight in network.checkpoint().items()}
    llama = LlamaForCausalLM(LlamaConfig.from_dict(configuration(SMALL)))
    llama.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.bfloat16().float())
        ids = torch.randint(0, SMALL.vocab, (2, 20))
        expected = llama.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(network.hidden_states(ids, torch.float32), expected, rtol=1e-4, atol=1e-4)


def test_export_is_served(tmp_path: Path) -> None:
    """The server loads the exported checkpoint."""
    export(Network(SMALL), tmp_path)
    shutil.copy(DEMO_DIRECTORY / "tokenizer.model", tmp_path)
    model = load_model(tmp_path, device="cpu", dtype=torch.float16, context_length=64, slots=1)
    assert model.vocab_size == SMALL.vocab


def test_learning_rate_rises_and_falls() -> None:
    """A warm-up, a plateau, and a decay without a jump, which ends near zero; the last part does it again."""
    recipe = Recipe()
    factors = [learning_rate(step, recipe) for step in range(recipe.steps)]
    assert factors[0] < 0.02
    assert factors[recipe.planned_steps // 5] == 1.0
    assert all(abs(later - factor) < 0.03 for factor, later in pairwise(factors))
    assert factors[recipe.late_step // 2 :] == sorted(factors[recipe.late_step // 2 :], reverse=True)
    assert factors[-1] < 0.01
    for refinement, (start, end) in zip(recipe.refinements, pairwise(recipe.starts()), strict=True):
        factors = [learning_rate(step, recipe) for step in range(start, end)]
        assert factors[0] < 0.02
        assert 0.95 * refinement.rate < max(factors) < refinement.rate
        assert factors[100:] == sorted(factors[100:], reverse=True)
        assert factors[-1] < 0.01
