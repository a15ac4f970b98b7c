"""A checkpoint with only a `tokenizer.json`, served by a process: texts equal transformers' decoding."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tests.integration.checkpoints.served_forms import made, only_tokenizer_json
from tests.integration.checkpoints.test_corpus import CHAT, expected_prompt, expected_reply
from tests.support.checkpoints import tensors
from tests.support.processes import server
from torch import Tensor
from transformers import LlamaTokenizer

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.engine.checkpoint.loader import HEAD

FIRST_PIECE = 259  # after the special and the byte tokens


def only_pieces(weights: dict[str, Tensor]) -> None:
    """Make special and byte tokens less probable than one of two pieces, so that each reply is valid text."""
    head = weights[HEAD].float()
    head[:FIRST_PIECE] = (head[FIRST_PIECE] + head[FIRST_PIECE + 1]) / 2
    weights[HEAD] = head


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as current transformers saves it."""
    directory = tmp_path_factory.mktemp("served") / "checkpoint"
    made(tensors(only_pieces), only_tokenizer_json(), dtype=torch.float32)(directory)
    return directory


@pytest.fixture(scope="module")
def stub(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A stub of the server that serves the checkpoint."""
    flags = ["--weights", str(checkpoint), "--device", "cpu", "--dtype", "float32"]
    with (
        server(tmp_path_factory.mktemp("state"), *flags) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        yield text_generation_pb2_grpc.TextGenerationServiceStub(channel)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> str:
    """The reply of transformers."""
    tokenizer: Any = LlamaTokenizer.from_pretrained(checkpoint)
    text: str = tokenizer.decode(expected_reply(checkpoint, expected_prompt(checkpoint)), skip_special_tokens=True)
    return text


def request(**options: Any) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=message.role, content=message.content) for message in CHAT]
    return pb.GenerateRequest(messages=messages, temperature=0, max_tokens=12, **options)


def test_texts_equal_transformers_decoding(stub: Any, expected: str) -> None:
    """The whole reply and the joined stream are the text of transformers for the same chat."""
    assert len(expected) > 12
    assert stub.Generate(request()).response == expected
    assert "".join(message.response for message in stub.GenerateStream(request(no_cache=True))) == expected


def test_a_stop_sequence_ends_the_text(stub: Any, expected: str) -> None:
    """The text ends before a stop sequence that begins inside a token."""
    stop = expected[7:10]
    assert stub.Generate(request(stop=[stop])).response == expected[: expected.index(stop)]
