"""Tests that seeds keep their texts: a table of requests and the tokens that they gave in earlier versions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.sampling import sampled_texts
from tests.unit.engine.native.models import library

from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.step_runner import HostStepRunner, StepRunner, host_step_runner
from llama2_server.engine.text.tokenizer import Tokenizer

ENTRIES = sampled_texts.read_table()


@pytest.fixture(params=ENTRIES, ids=[entry["checkpoint"] for entry in ENTRIES])
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each checkpoint of the table."""
    library()
    found: dict[str, Any] = request.param
    return found


@pytest.mark.parametrize("step_runner", [host_step_runner, HostStepRunner], ids=["native", "reference"])
def test_seeds_keep_their_texts(
    entry: dict[str, Any], step_runner: Callable[[LlamaModel], StepRunner], tmp_path: Path
) -> None:
    """Both samplers give the tokens and texts of the table, which is older than the rules of the reference sampler."""
    checkpoint = sampled_texts.checkpoint_of(entry["checkpoint"], tmp_path)
    if sampled_texts.fingerprint(checkpoint) != entry["fingerprint"]:
        pytest.skip("NOT TESTED: torch's random numbers differ on this processor, so the checkpoint differs")
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    found = sampled_texts.sampled(checkpoint, sampled_texts.requests_of(entry), step_runner)
    for reply, token_ids in zip(entry["replies"], found, strict=True):
        assert token_ids == reply["token_ids"], reply["params"]
        assert tokenizer.decode(token_ids) == reply["text"]
