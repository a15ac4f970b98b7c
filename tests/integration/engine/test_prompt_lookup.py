"""Prompt lookup in a running server: visible in its metrics, and in nothing that a client receives."""

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import free_port, server
from tests.unit.engine.native.models import library
from tools.make_checkpoint import Shape, make_checkpoint

from llama2_client import SyncClient

PASSAGE = "Once upon a time a small dog found a red ball in the park and took it home. "
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.6, "seed": 7},
    {"temperature": 1.0, "seed": 8, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose replies repeat themselves, so that guesses are worth their rows on any machine."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), Shape(context=4096, cycle=7))


def replies(folder: Path, *flags: str) -> tuple[list[Any], float, float]:
    """Return all that a client sees of the replies, and the numbers of proposed and accepted tokens."""
    metrics = f"127.0.0.1:{free_port()}"
    with server(folder, "--metrics-listen", metrics, *flags) as (_, address), SyncClient(address) as client:
        found = [
            client.generate(PASSAGE * 3, raw=True, max_tokens=150, no_cache=True, **request) for request in REQUESTS
        ]
        with urllib.request.urlopen(f"http://{metrics}/metrics") as scrape:
            text = scrape.read().decode()
    proposed, accepted = (
        float(re.findall(rf'^llama2_prompt_lookup_tokens_total{{type="{kind}"}} (\S+)$', text, re.MULTILINE)[0])
        for kind in ("proposed", "accepted")
    )
    seen = [
        (reply.text, reply.finish_reason, reply.input_tokens, reply.output_tokens, reply.neurons, reply.fingerprint)
        for reply in found
    ]
    return seen, proposed, accepted


def test_replies_and_usage_do_not_show_it(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The setting changes the metric; text, end, usage and reused tokens are the same."""
    library()
    guessed, proposed, accepted = replies(tmp_path_factory.mktemp("on"), "--weights", str(checkpoint))
    plain, *none = replies(tmp_path_factory.mktemp("off"), "--weights", str(checkpoint), "--no-prompt-lookup")
    assert guessed == plain
    assert proposed >= accepted > 0
    assert none == [0, 0]
