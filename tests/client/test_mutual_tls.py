"""`llama2` against a server that asks for client certificates."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import trustme
from tests.client.scripted_server import ScriptedServer
from tests.client.test_cli import run


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedServer]:
    """A server that takes clients of its authority only; the client's files lie in `tmp_path`."""
    authority = trustme.CA()
    own, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client.example.com")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    client.private_key_pem.write_to_path(tmp_path / "tls.key")
    (tmp_path / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in client.cert_chain_pems))
    pair = (own.private_key_pem.bytes(), b"".join(blob.bytes() for blob in own.cert_chain_pems))
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    async with ScriptedServer.running(credentials=credentials) as server:
        yield server


async def test_shows_its_certificate(server: ScriptedServer, tmp_path: Path) -> None:
    """With --certificate and --key the server lets the command in; without them it does not."""
    server.says("Hello.")
    ca = f"--ca={tmp_path / 'ca.crt'}"
    identity = (f"--certificate={tmp_path / 'tls.crt'}", f"--key={tmp_path / 'tls.key'}")
    result = await run(server.address, ca, *identity, "generate", "Hi")
    assert (result.code, result.out) == (0, "Hello.\n")
    result = await run(server.address, ca, "--timeout=10", "generate", "Hi")
    assert result.code in {3, 6}
    assert len(server.requests) == 1


async def test_certificate_and_key_come_together(tmp_path: Path) -> None:
    """One without the other is a wrong usage, said at once."""
    (tmp_path / "tls.crt").write_text("")
    result = await run("", f"--certificate={tmp_path / 'tls.crt'}", "generate", "Hi")
    assert result.code == 2
    assert "Give --certificate and --key together." in result.err
