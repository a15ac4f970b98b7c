"""Applications of the hosted endpoint, each in an environment of its own: only their base URL changes.

The host's SDKs for Python and JavaScript, LangChain's two integrations, and litellm.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.integration.examples.conftest import REPLY, EnvoyMaker
from tests.integration.examples.hosted.environments import install
from tests.support.service import Service, with_config

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.api.server import HOSTED_ENDPOINT
from llama2_server.card import RequestsPerMinute, load_card

# The test installs the client's packages.
pytestmark = pytest.mark.timeout(600)
ACCOUNT = "0123456789abcdef0123456789abcdef"


class Case(NamedTuple):
    """A program, and the parts of the host's replies and errors that its client returns."""

    program: str
    returns: frozenset[str]


CASES = [
    Case("cloudflare_sdk.py", frozenset({"usage", "status", "code"})),
    Case("cloudflare_sdk.mjs", frozenset({"usage", "status", "code"})),
    Case("langchain_community_llm.py", frozenset({"status"})),
    Case("langchain_cloudflare_chat.py", frozenset({"usage", "status", "code"})),
    Case("litellm_completion.py", frozenset({"code"})),  # its exceptions have other statuses than the response
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.program)
async def test_client(case: Case, serve_behind_envoy: EnvoyMaker, tmp_path: Path) -> None:
    """A reply, a stream, an invalid request and a used-up quota; the client, whose retries are off, sends each once."""
    (environment := tmp_path / "client").mkdir()
    program = install(case.program, environment)
    key, line = new_key(ACCOUNT)
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line}\n")
    card = with_config(
        load_card("llama-2-7b-chat-fp16"),
        infer_response_cache=None,
        max_requests_per_min=RequestsPerMinute(default=2),
    )
    async with serve_behind_envoy(card=card, accounts=ApiKeyAuthenticator(keys)) as (service, envoy):
        results = await program.results(f"http://{envoy.address}/client/v4", ACCOUNT, key, card.name)
        assert results["unary"]["text"] == REPLY
        assert "".join(results["stream"]["pieces"]) == REPLY
        assert results["invalid"] | error(case, 400, 3003) == results["invalid"]
        assert results["quota"] | error(case, 429, 3036) == results["quota"]
        if "code" in case.returns:
            assert results["invalid"]["message"].startswith(("prompt: ", "messages[0].content: "))
        if "usage" in case.returns:
            assert results["unary"]["usage"]["completion_tokens"] > 0
        codes = ("OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
        assert [hosted_calls(service, code) for code in codes] == [2, 1, 1]


def hosted_calls(service: Service, code: str) -> float:
    """Return the number of calls of the hosted endpoint that ended with a code."""
    registry = service.metrics.registry
    labels = [{"method": f"{HOSTED_ENDPOINT}/{method}", "code": code} for method in ("Run", "RunStream")]
    return sum(registry.get_sample_value("llama2_requests_total", label) or 0 for label in labels)


def error(case: Case, status: int, code: int) -> dict[str, Any]:
    """Return the part of an error that the client returns."""
    return {name: value for name, value in (("status", status), ("code", code)) if name in case.returns}
