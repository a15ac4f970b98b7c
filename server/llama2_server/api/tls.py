"""The server's certificate, key and client CA: files that may change while the server runs.

Each new connection checks the files, and uses their content if they match. Kubernetes replaces a whole directory at
once; other tools write one file after another. Until the files match, the previous certificate stays in use.
"""

import logging
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from llama2_server.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

# OpenSSL's verification errors that operators often meet.
_VERIFICATION_ERRORS = {9: "is not valid yet; check the clock", 10: "has expired; renew it"}


class CertificateError(ConfigurationError):
    """A file cannot be used; the one-line message names the flag and the file."""


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Paths of the PEM files."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> "Certificates":
        """Read and check the files.

        Raises:
            CertificateError: a file is missing, not PEM, or expired, or does not match the others.
        """
        content = self._contents()
        _test_handshake(self)
        # OpenSSL read the files itself: serve exactly the content that it checked.
        if self._contents() != content:
            raise CertificateError(f"--tls-certificate: {self.certificate} or its key changed during the check; retry")
        return content

    def fingerprint(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return a value that changes when a file is replaced, rewritten or removed."""
        return tuple(None if path is None else _stamp(path) for path in (self.certificate, self.key, self.client_ca))

    def _contents(self) -> "Certificates":
        return Certificates(
            _read_pem(self.certificate, "--tls-certificate"),
            _read_pem(self.key, "--tls-key"),
            None if self.client_ca is None else _read_pem(self.client_ca, "--tls-client-ca"),
        )


@dataclass(frozen=True, slots=True)
class Certificates:
    """The content of the files at one moment."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return the content in gRPC's form."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


class RotatingCertificates:
    """Server credentials that follow their files; open connections keep theirs.

    Raises:
        CertificateError: as `CertificateFiles.read`.
    """

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._fingerprint = files.fingerprint()
        self._current = files.read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials for one port of a server."""
        return grpc.dynamic_ssl_server_credentials(
            self._current.configuration(),
            self._reload,  # type: ignore[arg-type]  # None, for no change, is what gRPC documents
            require_client_authentication=self._files.client_ca is not None,
        )

    def _reload(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration, or None; gRPC calls this for each new connection, on one of its threads."""
        with self._lock:
            fingerprint = self._files.fingerprint()
            if fingerprint == self._fingerprint:
                return None
            try:
                current = self._files.read()
            except CertificateError as error:
                logger.error("certificate reload failed; keeping the previous certificate: %s", error)  # noqa: TRY400 - one line is enough
                self._fingerprint = fingerprint  # logs once per change
                return None
            self._fingerprint, self._current = fingerprint, current
            logger.info("certificate reloaded from %s for new connections", self._files.certificate)
            return current.configuration()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_pem(path: Path, flag: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{flag}: cannot read {path}: {error.strerror}; pass a readable PEM file") from error
    if b"-----BEGIN " not in content:
        raise CertificateError(f"{flag}: {path} is not PEM; it must have a line that starts with -----BEGIN")
    return content


def _test_handshake(files: CertificateFiles) -> None:
    """Test the files with a TLS handshake in memory; if it succeeds, clients that trust the certificate accept it."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself, not its issuer
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _as_certificate_error(f"--tls-certificate: {files.certificate} has no readable certificate"):
        client.load_verify_locations(files.certificate)
    with _as_certificate_error(f"--tls-key: {files.key} has no readable private key; a passphrase is not supported"):
        try:
            server.load_cert_chain(
                files.certificate, files.key, password=lambda: ""
            )  # otherwise OpenSSL prompts on the terminal
        except ssl.SSLError as error:
            if error.reason != "KEY_VALUES_MISMATCH":
                raise
            message = f"--tls-key: {files.key} is not the key of the first certificate in {files.certificate}"
            raise CertificateError(message) from error
    if files.client_ca is not None:
        with _as_certificate_error(f"--tls-client-ca: {files.client_ca} has no readable certificate"):
            server.load_verify_locations(files.client_ca)
    try:
        _handshake(client, server)
    except ssl.SSLCertVerificationError as error:
        reason = _VERIFICATION_ERRORS.get(error.verify_code, f"is rejected by clients: {error.verify_message}")
        raise CertificateError(f"--tls-certificate: {files.certificate} {reason}") from error
    except ssl.SSLError as error:
        raise CertificateError(f"--tls-certificate: {files.certificate} cannot be used: {error.reason}") from error


@contextmanager
def _as_certificate_error(message: str) -> Iterator[None]:
    """Replace OpenSSL's error with a message for operators."""
    try:
        yield
    except OSError as error:  # ssl.SSLError is one
        raise CertificateError(message) from error


def _handshake(client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
