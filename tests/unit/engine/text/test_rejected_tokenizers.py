"""A `tokenizer.json` that the server cannot use is rejected with the name of the file and the part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.checkpoints import edit_tokenizer_json

from llama2_server.engine.errors import WeightsError
from llama2_server.engine.text.tokenizer import Tokenizer

REJECTED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another model": (lambda d: d["model"].update(type="Unigram"), "the model's type is 'Unigram', expected 'BPE'"),
    "no type": (lambda d: d.update(model={"vocab": {}}), "the model's type is None, expected 'BPE'"),
    "no byte fallback": (lambda d: d["model"].update(byte_fallback=False), "byte_fallback is False, expected True"),
    "dropout": (lambda d: d["model"].update(dropout=0.1), r"dropout is 0\.1, expected None"),
    "a normalizer": (lambda d: d.update(normalizer={"type": "NFKC"}), r'has the normalizer \{"type": "NFKC"\}, which'),
    "a normalizer in a sequence": (
        lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        r'has the normalizer \{"type": "Lowercase"\}, which',
    ),
    "another pre-tokenizer": (
        lambda d: d.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}),
        r'has the pre-tokenizer \{"type": "ByteLevel", .*, which',
    ),
    "another decoder": (
        lambda d: d.update(decoder={"type": "WordPiece"}),
        r'has the decoder \[\{"type": "WordPiece"\}',
    ),
    "no start token": (lambda d: rename_token(d, "<s>"), "has no <s> or no </s> token; "),
    "no end token": (lambda d: rename_token(d, "</s>"), "has no <s> or no </s> token; "),
    "a broken part": (
        lambda d: d.update(post_processor={"type": "No"}),
        r"the tokenizers library rejects it \(.*\); pass the tokenizer\.json or",
    ),
    "no model": (lambda d: d.pop("model"), "has no model of a tokenizer; pass"),
}


def rename_token(document: dict[str, Any], name: str) -> None:
    vocab = document["model"]["vocab"]
    vocab["<begin>"] = vocab.pop(name)
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != name]
    document["post_processor"] = None


@pytest.mark.parametrize(("edit", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_unusable_tokenizers_are_rejected_by_name(
    saved: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    """One line names the file, the part that Llama-2 does not have, and the remedy."""
    path = edit_tokenizer_json(saved, tmp_path, edit)
    with pytest.raises(WeightsError, match=message) as rejection:
        Tokenizer(path)
    assert str(rejection.value).startswith(f"{path}: ")
    assert "\n" not in str(rejection.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}"])
def test_an_invalid_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    """The error for an invalid tokenizer.json contains its path."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{path}: (not valid JSON|has no model)"):
        Tokenizer(path)
    path.unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json: no such file; copy it from the Llama-2 checkpoint"):
        Tokenizer(path)
