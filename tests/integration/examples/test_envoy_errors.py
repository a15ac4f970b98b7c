"""`examples/envoy` with a real Envoy: errors of the service and of Envoy."""

import asyncio
from pathlib import Path

from tests.integration.examples.conftest import EnvoyMaker
from tests.integration.examples.envoy_responses import details, violations
from tests.support.service import with_config

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.card import ModelCard, RequestsPerMinute


async def test_invalid_requests_are_400_with_a_bad_request(serve_behind_envoy: EnvoyMaker) -> None:
    """Each violation of schema and rules is returned with its field, for both output forms; zeros are preserved."""
    async with serve_behind_envoy() as (_, envoy):
        for stream in (False, True):
            rejected = await envoy.post({"prompt": "hi", "max_tokens": 0, "top_p": 0, "stream": stream})
            assert violations(rejected).keys() == {"max_tokens", "top_p"}
            assert details(rejected)["ErrorInfo"]["reason"] == "INVALID_REQUEST"
            assert details(rejected)["RequestInfo"]["request_id"]
        long = await envoy.post({"prompt": "x" * 4097})
        assert violations(long) == {"prompt": "must have at most 4096 characters, got 4097"}
        assert violations(await envoy.post({"messages": [{"role": "user"}]})) == {"messages[0].content": "is required"}
        assert violations(await envoy.post({})).keys() == {"prompt"}
        assert violations(await envoy.post("")).keys() == {"prompt"}
        quoted = await envoy.post({"prompt": "hi", "stream": "true"})
        assert violations(quoted).keys() == {"stream"}


WRONG_TYPES = [
    ({"prompt": 5}, "prompt", "must be of type string"),
    ({"prompt": {"hushhush": 1}}, "prompt", "must not be an object"),
    ({"prompt": "hushhush", "max_tokens": "many"}, "max_tokens", "must be of type integer, in 32 bits"),
    ({"prompt": "hushhush", "max_tokens": 2**40}, "max_tokens", "must be of type integer, in 32 bits"),
    ({"prompt": "hushhush", "seed": -1}, "seed", "must be of type integer, not negative, in 64 bits"),
    ({"prompt": "hushhush", "temperature": "hot"}, "temperature", "must be of type number"),
    ({"prompt": "hushhush", "stream": 1}, "stream", "must be of type boolean"),
    ({"messages": "hushhush"}, "messages", "must hold objects"),
    ({"messages": [7]}, "messages[0]", "must hold objects"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "must be of type string"),
    ({"messages": [{"role": "user", "content": {"hushhush": 1}}]}, "messages[0].content", "must not be an object"),
    (
        {"messages": [{"role": "user", "content": [{"text": "hushhush"}]}]},
        "messages[0].content",
        "must not be an array",
    ),
    ({"messages": [{"role": ["hushhush"], "content": "content"}]}, "messages[0].role", "must not be an array"),
    ({"prompt": ["hushhush"]}, "prompt", "must not be an array"),
    ({"prompt": '"top_p": [', "max_tokens": [1]}, "max_tokens", "must not be an array"),
    (["hushhush"], "", None),
    ('{"prompt": "hushhush" "hushhush"}', "", None),
    ('{"prompt": "hushhush', "", None),
    ('{"prompt": "hushhush \\ud800"}', "", None),
    ('{"prompt": "hushhush", "temperature": 1e999}', "", None),
]


async def test_unreadable_bodies_are_400_with_a_bad_request(serve_behind_envoy: EnvoyMaker) -> None:
    """For a value of the wrong type or invalid JSON, the error names the field and repeats nothing of the body."""
    async with serve_behind_envoy() as (service, envoy):
        for body, field, description in WRONG_TYPES:
            rejected = await envoy.post(body)
            ((found_field, found_description),) = violations(rejected).items()
            assert (found_field, found_description) == (field, description or found_description), body
            assert rejected.json()["message"].removeprefix(f"{field}: ") == found_description
            assert "hushhush" not in rejected.text
        assert service.model.prefills == 0
        assert not any("[error]" in line or "hushhush" in line for line in envoy.log)


async def test_api_keys_are_forwarded(serve_behind_envoy: EnvoyMaker, tmp_path: Path) -> None:
    """`Authorization: Bearer KEY` is the API key; a missing key is 401, the key of a disabled account 403."""
    (key, line), (disabled_key, disabled_line) = new_key("alice"), new_key("bob")
    disabled_line = disabled_line.rstrip("}") + ", enabled: false}"
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line}\n  {disabled_line}\n")
    async with serve_behind_envoy(accounts=ApiKeyAuthenticator(keys)) as (_, envoy):
        assert (await envoy.post({"prompt": "hi"}, authorization=f"Bearer {key}")).status_code == 200
        for stream in (False, True):
            rejected = await envoy.post({"prompt": "hi", "stream": stream})
            assert rejected.status_code == 401
            assert details(rejected)["ErrorInfo"]["reason"] == "UNAUTHENTICATED"
        disabled = await envoy.post({"prompt": "hi"}, authorization=f"Bearer {disabled_key}")
        assert disabled.status_code == 403


async def test_quota_is_429_with_retry_after(serve_behind_envoy: EnvoyMaker, demo_card: ModelCard) -> None:
    """A used-up quota is 429 with QuotaFailure, RetryInfo and Retry-After in whole seconds, rounded up."""
    quota = RequestsPerMinute(default=2)
    card = with_config(demo_card, infer_response_cache=None, max_requests_per_min=quota)
    async with serve_behind_envoy(card=card) as (_, envoy):
        for _ in range(2):
            assert (await envoy.post({"prompt": "hi"})).status_code == 200
        for stream in (False, True):
            rejected = await envoy.post({"prompt": "hi", "stream": stream})
            assert rejected.status_code == 429
            found = details(rejected)
            assert found["QuotaFailure"]["violations"][0]["subject"] == "account:anonymous"
            delay = float(found["RetryInfo"]["retry_delay"].removesuffix("s"))
            assert delay <= int(rejected.headers["retry-after"]) < delay + 1


async def test_deadline_is_504(serve_behind_envoy: EnvoyMaker) -> None:
    """The header `grpc-timeout` sets the deadline of the call."""
    async with serve_behind_envoy() as (service, envoy):
        service.model.gate()
        late = await envoy.post({"prompt": "hi"}, **{"grpc-timeout": "50m"})
        assert late.status_code == 504
        assert late.json()["code"] == 4


async def test_a_full_queue_is_429(serve_behind_envoy: EnvoyMaker) -> None:
    """A full queue is 429 with the time to wait; Envoy does not retry the request."""
    async with serve_behind_envoy(max_queue_size=0) as (service, envoy):
        service.model.gate()
        holder = asyncio.create_task(envoy.post({"prompt": "hold"}))
        await asyncio.to_thread(service.model.in_step.wait, 10)
        rejected = await envoy.post({"prompt": "hi"})
        assert rejected.status_code == 429
        assert details(rejected)["ErrorInfo"]["reason"] == "QUEUE_FULL"
        assert int(rejected.headers["retry-after"]) >= 1
        service.model.open_gate()
        assert (await holder).status_code == 200


async def test_other_methods_types_and_paths_are_rejected(serve_behind_envoy: EnvoyMaker) -> None:
    """Envoy rejects other methods, content types and paths with a message, before the service is called."""
    async with serve_behind_envoy() as (_, envoy):
        got = await envoy.http.get("/v1/generate")
        assert (got.status_code, got.headers["allow"]) == (405, "POST")
        form = await envoy.post({"prompt": "hi"}, **{"content-type": "application/x-www-form-urlencoded"})
        assert form.status_code == 415
        assert "application/json" in form.json()["message"]
        unknown = await envoy.post({"prompt": "hi"}, '/v1/"nothing\\')
        assert unknown.status_code == 404
        assert (await envoy.post({"prompt": "x" * 2_000_000})).status_code == 413
        assert (await envoy.post({"prompt": "hi"}, "/v1/generate?from=here")).status_code == 200
        for rejected in (got, form, unknown):
            details(rejected)
