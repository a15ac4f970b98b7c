"""The tokenizer's file is selected, and tokens that other files add are logged."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tests.support.checkpoints import save_tokenizer_json
from tests.unit.engine.checkpoint.loading import load

from llama2_server.engine.checkpoint.tokenizer_files import open_tokenizer
from llama2_server.engine.errors import WeightsError


def add_token(path: Path, content: str, token_id: int) -> None:
    document = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": token_id, "content": content, "special": True, **flags})
    path.write_text(json.dumps(document))


def test_the_tokenizer_model_wins(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With both files, tokenizer.model is used, and one log line lists the added tokens that it does not have."""
    path = save_tokenizer_json(copy)
    with caplog.at_level(logging.INFO):
        assert open_tokenizer(copy).file_name == "tokenizer.model"
    assert caplog.messages == []
    add_token(path, "<pad>", 600)
    add_token(path, "<tool>", 601)
    with caplog.at_level(logging.INFO):
        assert open_tokenizer(copy).file_name == "tokenizer.model"
    assert caplog.messages == [
        "tokenizer.model is used; in a text, the added tokens <pad> (600), <tool> (601) are ordinary text"
    ]


def test_many_added_tokens_are_counted(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An added_tokens.json of older transformers is listed too; a long list is cut."""
    names = {f"<extra_{index}>": 600 + index for index in range(100)}
    (copy / "added_tokens.json").write_text(json.dumps(names))
    with caplog.at_level(logging.INFO):
        open_tokenizer(copy)
    (message,) = caplog.messages
    assert "<extra_0> (600), <extra_1> (601), " in message
    assert message.endswith("<extra_9> (609) and 90 more are ordinary text")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": "b"}', '{"a": null}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json"])
def test_unused_files_may_be_broken(copy: Path, caplog: pytest.LogCaptureFixture, name: str, content: str) -> None:
    """Next to a tokenizer.model, the other files only serve for the log line."""
    (copy / name).write_text(content)
    with caplog.at_level(logging.INFO):
        assert open_tokenizer(copy).file_name == "tokenizer.model"
    assert caplog.messages == []


def test_a_tokenizer_json_alone_is_used(copy: Path) -> None:
    """The model that current transformers saves loads without a tokenizer.model."""
    expected = load(copy).prefill(0, [1, 5, 9], 0)
    save_tokenizer_json(copy)
    (copy / "tokenizer.model").unlink()
    assert open_tokenizer(copy).file_name == "tokenizer.json"
    assert torch.equal(load(copy).prefill(0, [1, 5, 9], 0), expected)


def test_a_larger_tokenizer_json_is_rejected(copy: Path) -> None:
    """A token that a text can contain needs a row of the embedding."""
    path = save_tokenizer_json(copy)
    (copy / "tokenizer.model").unlink()
    document = json.loads(path.read_text())
    document["model"]["vocab"]["more"] = 600
    path.write_text(json.dumps(document))
    with pytest.raises(WeightsError, match=r"tokenizer\.json: has 601 tokens, expected at most 600, the rows of"):
        load(copy)
