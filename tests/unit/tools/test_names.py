"""The search for retired names."""

import pytest
from tools.names import uses_in


@pytest.mark.parametrize(
    ("path", "text", "uses"),
    [
        ("docs/api.md", "a\nLINE_FULL is sent", ["docs/api.md:2: LINE_FULL -> QUEUE_FULL"]),
        ("docs/a.md", "--line-limit 3", ["docs/a.md:1: --line-limit -> max_queue_size"]),
        ("docs/a.md", "LLAMA2_CACHE_MAX_BYTES=3", ["docs/a.md:1: LLAMA2_CACHE_MAX_BYTES -> response_cache_*"]),
        ("helm/a.yaml", "llama2_cache_hits_total", ["helm/a.yaml:1: llama2_cache_hits_total -> response_cache_*"]),
        ("server/a.py", "class Turn:", ["server/a.py:1: class Turn -> SlotLease"]),
        (
            "server/llama2_server/slots.py",
            "",
            ["server/llama2_server/slots.py:0: llama2_server/slots.py -> request_queue"],
        ),
        (
            "tests/a.py",
            "from llama2_server.redis_link import x",
            ["tests/a.py:1: llama2_server.redis_link import -> redis_client"],
        ),
    ],
)
def test_retired_name_is_found(path: str, text: str, uses: list[str]) -> None:
    """A use is found in each form of a name, in the text and in the path of the file."""
    assert list(uses_in(path, text)) == uses


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("docs/api.md", "QUEUE_WAIT_TOO_LONG, --response-cache-max-bytes, LLAMA2_SHUTDOWN_GRACE_SECONDS"),
        ("server/a.py", "Turn the key; the slots of a model; def turn(): ..."),
        ("client/a.py", "class Turn:"),
        ("CHANGELOG.md", "LINE_FULL is now QUEUE_FULL"),
    ],
)
def test_other_names_are_not_found(path: str, text: str) -> None:
    """New names that contain an old one, ordinary words, other folders and the changelog have no uses."""
    assert list(uses_in(path, text)) == []
