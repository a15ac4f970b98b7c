"""A call without a valid API key is rejected before its message is read, over raw HTTP/2."""

from pathlib import Path
from typing import Any

import h2.events
import pytest
from tests.support.http2_peer import Http2Peer
from tests.support.service import ServiceMaker, until

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key

# Numbers of gRPC's status codes.
INVALID_ARGUMENT, PERMISSION_DENIED, UNAUTHENTICATED = "3", "7", "16"
METHODS = [
    ("llama2.v1.TextGenerationService", "Generate"),
    ("llama2.v1.TextGenerationService", "GenerateStream"),
    ("llama2.v1.TextGenerationService", "CountTokens"),
    ("llama2.v1.AccountService", "GetUsage"),
    ("llama2.hosted.v1.HostedEndpointService", "Run"),
    ("llama2.hosted.v1.HostedEndpointService", "RunStream"),
]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[ApiKeyAuthenticator, str, str]:
    """Return an authenticator with a valid key and the key of a disabled account."""
    (key, entry), (disabled_key, disabled_entry) = new_key("42"), new_key("43")
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n  {entry}\n  {disabled_entry.replace('enabled: true', 'enabled: false')}\n")
    return ApiKeyAuthenticator(file), key, disabled_key


async def status(peer: Http2Peer) -> str:
    """Return the status of the next call that ends without a reply."""
    headers: dict[Any, Any] = dict((await peer.event(h2.events.ResponseReceived)).headers or ())
    if "grpc-status" not in headers:
        headers = dict((await peer.event(h2.events.TrailersReceived)).headers or ())
    assert "grpc-status-details-bin" in headers
    return str(headers["grpc-status"])


@pytest.mark.parametrize(("service_name", "method"), METHODS)
async def test_message_without_a_key_is_not_read(
    serve_scripted: ServiceMaker, keys: tuple[ApiKeyAuthenticator, str, str], service_name: str, method: str
) -> None:
    """The status comes while the message is incomplete: without a key, with an unknown one, and a disabled account."""
    authenticator, key, disabled_key = keys
    cases = {
        (): UNAUTHENTICATED,
        (f"Bearer {key[:-1]}x",): UNAUTHENTICATED,
        (f"Bearer {disabled_key}",): PERMISSION_DENIED,
    }
    async with (
        serve_scripted(accounts=authenticator) as service,
        Http2Peer.connected(service.address) as peer,
    ):
        for header, expected in cases.items():
            metadata = [("authorization", value) for value in header]
            stream = await peer.start_call(service.address, *metadata, service=service_name, method=method)
            peer.http2.send_data(stream, b"\0" + (1000).to_bytes(4, "big") + b"the message begins")
            await peer.flush()
            assert await status(peer) == expected
        await until(lambda: service.finished_calls("PERMISSION_DENIED") == 1)
        assert service.finished_calls("UNAUTHENTICATED") == 2


async def test_message_with_a_key_is_read(
    serve_scripted: ServiceMaker, keys: tuple[ApiKeyAuthenticator, str, str]
) -> None:
    """With a valid key, the call waits for its whole message; it is rejected because the message is not valid."""
    authenticator, key, _ = keys
    async with (
        serve_scripted(accounts=authenticator) as service,
        Http2Peer.connected(service.address) as peer,
    ):
        stream = await peer.start_call(service.address, ("authorization", f"Bearer {key}"))
        peer.http2.send_data(stream, b"\0" + (3).to_bytes(4, "big") + b"\xff\xff")
        await peer.flush()
        peer.http2.ping(b"8 bytes.")
        await peer.flush()
        await peer.event(h2.events.PingAckReceived)
        assert service.finished_calls("INVALID_ARGUMENT") == 0
        peer.http2.send_data(stream, b"\xff", end_stream=True)
        await peer.flush()
        assert await status(peer) == INVALID_ARGUMENT
