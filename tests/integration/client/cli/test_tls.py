"""TLS options of the `llama2` command: --ca, --certificate and --key."""

from __future__ import annotations

from pathlib import Path

import grpc
from tests.integration.client.cli.command import run
from tests.support.certificates import Authority
from tests.support.scripted_server import ScriptedServer


async def test_a_client_certificate_is_sent(tmp_path: Path) -> None:
    """--ca, --certificate and --key reach a server that requires a client certificate; without one, the call fails."""
    authority = Authority(tmp_path)
    certificate, key = authority.pair()
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())], authority.root, require_client_auth=True
    )
    client_certificate = ["--certificate", str(certificate), "--key", str(key)]
    async with ScriptedServer.running(credentials=credentials) as server:
        ca = ["--ca", str(authority.root_file())]
        assert (await run(server.address, *ca, *client_certificate, "generate", "Hi")).code == 0
        rejected = await run(server.address, *ca, "generate", "Hi")
        assert rejected.code == 3


async def test_an_invalid_ca_file_is_rejected(tmp_path: Path) -> None:
    """A file without a certificate is a usage error that names the file, not an unreachable server."""
    path = tmp_path / "ca.pem"
    path.write_text("no certificate")
    result = await run("localhost:1", "--ca", str(path), "health")
    assert result.code == 2
    expected = f"llama2: --ca: {path} is not a PEM certificate; pass the certificate of the server's authority\n"
    assert result.err == expected


async def test_files_that_do_not_match_are_rejected(tmp_path: Path) -> None:
    """A certificate without its key, or with another key, is a usage error, without a call."""
    certificate, _ = Authority(tmp_path).pair()
    (tmp_path / "other").mkdir()
    _, other_key = Authority(tmp_path / "other").pair()
    alone = await run("127.0.0.1:1", "--certificate", str(certificate), "health")
    assert alone.code == 2
    assert "--certificate and --key: one of them is missing; give both" in alone.err
    both = ["--certificate", str(certificate), "--key", str(other_key)]
    mismatched = await run("127.0.0.1:1", *both, "health")
    assert mismatched.code == 2
    assert "are not a matching pair of PEM files" in mismatched.err
