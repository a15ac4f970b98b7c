"""TLS, mutual TLS, and certificates that change while the server runs."""

import asyncio
import os
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme
from pydantic import ValidationError
from tests.support.certificates import Authority
from tests.support.service import ServiceMaker

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.api.tls import CertificateError, CertificateFiles
from llama2_server.config.settings import Settings


async def count_tokens(address: str, credentials: grpc.ChannelCredentials) -> int:
    """Make a call on a new connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        return (await stub.CountTokens(pb.CountTokensRequest(prompt="Hi"), timeout=60)).input_tokens


async def server_certificate(address: str) -> bytes:
    """Return the certificate that the server sends on a new connection."""
    host, _, port = address.rpartition(":")
    return (await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))).encode()


def leaf(certificate: Path) -> bytes:
    """Return the first certificate of a file."""
    first, end, _ = certificate.read_bytes().partition(b"-----END CERTIFICATE-----\n")
    return first + end


async def test_only_tls_is_accepted(serve_scripted: ServiceMaker, authority: Authority) -> None:
    """With certificate and key, the port accepts only clients that use TLS and trust the authority."""
    certificate, key = authority.pair()
    async with serve_scripted(tls_certificate=certificate, tls_key=key) as service:
        assert await count_tokens(service.address, grpc.ssl_channel_credentials(authority.root)) > 0
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await count_tokens(service.address, grpc.ssl_channel_credentials(Authority(authority.folder).root))
        assert rejected.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError) as plain:  # the channel of `service` has no TLS
            await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"), timeout=60)
        assert plain.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls_accepts_only_certificates_of_the_client_ca(
    serve_scripted: ServiceMaker, authority: Authority, tmp_path: Path
) -> None:
    """With a client CA, a client without a certificate, or with another authority's, cannot connect."""
    certificate, key = authority.pair()
    other = Authority(tmp_path).issue("other.test")
    files = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": authority.root_file()}

    def with_certificate(client: trustme.LeafCert) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            authority.root,
            client.private_key_pem.bytes(),
            client.cert_chain_pems[0].bytes(),
        )

    async with serve_scripted(**files) as service:
        assert await count_tokens(service.address, with_certificate(authority.issue("client.test"))) > 0
        for credentials in (with_certificate(other), grpc.ssl_channel_credentials(authority.root)):
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await count_tokens(service.address, credentials)
            assert rejected.value.code() is grpc.StatusCode.UNAVAILABLE


def replace_link(link: Path, target: Path) -> None:
    """Replace the link to the directory atomically, as Kubernetes does when a Secret changes."""
    new = link.with_name("..tmp")
    new.symlink_to(target.name)
    os.replace(new, link)


async def test_certificate_renewal_fails_no_call(serve_scripted: ServiceMaker, authority: Authority) -> None:
    """Certificates are replaced as in Kubernetes, while connections open and close and one call runs."""
    mounted = authority.folder / "mounted"
    mounted.mkdir()
    data = mounted / "..data"

    def renew(name: str) -> None:
        (mounted / name).mkdir()
        authority.write(authority.issue(), mounted / name)
        replace_link(data, mounted / name)

    renew("first")
    for name in ("tls.crt", "tls.key"):
        (mounted / name).symlink_to(Path("..data") / name)
    files = {"tls_certificate": mounted / "tls.crt", "tls_key": mounted / "tls.key"}
    trusting = grpc.ssl_channel_credentials(authority.root)
    async with serve_scripted(**files) as service, grpc.aio.secure_channel(service.address, trusting) as channel:
        service.model.gate()
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        running = stub.Generate(pb.GenerateRequest(prompt="Hi"), timeout=60)
        for name in ("second", "third"):
            calls = [asyncio.create_task(count_tokens(service.address, trusting)) for _ in range(10)]
            renew(name)
            calls += [asyncio.create_task(count_tokens(service.address, trusting)) for _ in range(10)]
            assert all(await asyncio.gather(*calls))
            assert await server_certificate(service.address) == leaf(mounted / name / "tls.crt")
        service.model.open_gate()
        assert (await running).response


async def test_invalid_files_keep_the_old_certificate(
    serve_scripted: ServiceMaker, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """A half-written certificate, or one without its new key, is only logged; complete files are used again."""
    certificate, key = authority.pair()
    first = leaf(certificate)
    trusting = grpc.ssl_channel_credentials(authority.root)
    async with serve_scripted(tls_certificate=certificate, tls_key=key) as service:
        new = authority.issue()
        chain = b"".join(blob.bytes() for blob in new.cert_chain_pems)
        for content, words in (
            (chain[: len(chain) // 3], "has no readable certificate"),
            (chain, "is not the key of the first certificate"),
            (b"", "is not PEM"),
        ):
            certificate.write_bytes(content)
            assert await server_certificate(service.address) == first
            assert await count_tokens(service.address, trusting) > 0
            assert words in caplog.messages[-1]
        certificate.unlink()
        assert await server_certificate(service.address) == first
        authority.write(new, authority.folder)
        assert await server_certificate(service.address) == leaf(certificate) != first


def _replace_with_expired_certificate(authority: Authority, files: CertificateFiles) -> None:
    authority.write(authority.issue(not_after=datetime.now(UTC) - timedelta(days=1)), authority.folder)


def _replace_with_future_certificate(authority: Authority, files: CertificateFiles) -> None:
    authority.write(authority.issue(not_before=datetime.now(UTC) + timedelta(days=1)), authority.folder)


def _replace_key(authority: Authority, files: CertificateFiles) -> None:
    files.key.write_bytes(authority.issue().private_key_pem.bytes())


def _encrypt_key(authority: Authority, files: CertificateFiles) -> None:
    files.key.write_bytes(files.key.read_bytes().replace(b" PRIVATE", b" ENCRYPTED PRIVATE"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda authority, files: files.certificate.unlink(),
            "--tls-certificate: cannot read {certificate}: No such file",
        ),
        (lambda authority, files: files.key.unlink(), "--tls-key: cannot read {key}: No such file"),
        (lambda authority, files: files.certificate.write_text("junk"), "--tls-certificate: {certificate} is not PEM"),
        (lambda authority, files: files.key.write_bytes(b"\0\xff"), "--tls-key: {key} is not PEM"),
        (
            lambda authority, files: files.certificate.write_text("-----BEGIN CERTIFICATE-----\njunk"),
            "--tls-certificate: {certificate} has no readable certificate",
        ),
        (
            lambda authority, files: files.key.write_text("-----BEGIN PRIVATE KEY-----\njunk"),
            "--tls-key: {key} has no readable private key",
        ),
        (_encrypt_key, "--tls-key: {key} has no readable private key; a passphrase is not supported"),
        (_replace_key, "--tls-key: {key} is not the key of the first certificate in {certificate}"),
        (_replace_with_expired_certificate, "--tls-certificate: {certificate} has expired"),
        (_replace_with_future_certificate, "--tls-certificate: {certificate} is not valid yet"),
        (lambda authority, files: authority.root_file().write_text("junk"), "--tls-client-ca: {client_ca} is not PEM"),
        (
            lambda authority, files: authority.root_file().write_text("-----BEGIN CERTIFICATE-----\njunk"),
            "--tls-client-ca: {client_ca} has no readable certificate",
        ),
    ],
)
def test_invalid_files_are_named(
    authority: Authority, damage: Callable[[Authority, CertificateFiles], object], words: str
) -> None:
    """The error names the flag, the file and the reason."""
    certificate, key = authority.pair()
    files = CertificateFiles(certificate, key, authority.root_file())
    files.read()
    damage(authority, files)
    with pytest.raises(CertificateError) as rejected:
        files.read()
    expected = words.format(certificate=files.certificate, key=files.key, client_ca=files.client_ca)
    assert str(rejected.value).startswith(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tls_certificate": "a"}, "--tls-key: missing; TLS needs both"),
        ({"tls_key": "a"}, "--tls-certificate: missing; TLS needs both"),
        ({"tls_client_ca": "a"}, "--tls-client-ca: mutual TLS also needs"),
        ({"max_connection_age_grace_seconds": 300}, "--max-connection-age-grace-seconds: must be more than"),
    ],
)
def test_inconsistent_connection_settings_are_rejected(settings: dict[str, object], words: str) -> None:
    """Rejected: incomplete sets of TLS files, and a grace period that would cut off queued requests."""
    with pytest.raises(ValidationError, match=words):
        Settings.model_validate(settings)
