"""The server's certificate, key and client authorities: files that may change while the server runs.

Each new connection has the files looked at, and gets what is in them if they belong together. Kubernetes swaps a whole
directory at once, other tools write one file after the other: what does not fit leaves the certificate before in force.
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

# OpenSSL's words for what an operator is likely to meet.
_CERTIFICATE_TROUBLE = {9: "is not valid yet", 10: "has expired"}


class CertificateError(ConfigurationError):
    """A file cannot be used; the message is one line for the operator that names the setting and the file."""


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where the PEM files are."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> "Certificates":
        """What is in the files, if a server can work with it.

        Raises:
            CertificateError: a file is missing, is no PEM, has expired, or does not belong to the others.
        """
        found = self._contents()
        _check(self)
        # OpenSSL has read the files by itself; what is served is what it has checked.
        if self._contents() != found:
            raise CertificateError(f"tls_certificate: {self.certificate} or its key was changed while it was read")
        return found

    def fingerprint(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Differs when a file was replaced, rewritten or removed."""
        return tuple(None if path is None else _stamp(path) for path in (self.certificate, self.key, self.client_ca))

    def _contents(self) -> "Certificates":
        return Certificates(
            _bytes(self.certificate, "tls_certificate"),
            _bytes(self.key, "tls_key"),
            None if self.client_ca is None else _bytes(self.client_ca, "tls_client_ca"),
        )


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the files held at one moment."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """In gRPC's form."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


class RotatingCertificates:
    """Credentials of a server that follow their files; connections that are open stay as they are.

    Raises:
        CertificateError: as `CertificateFiles.read`.
    """

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = files.fingerprint()
        self._current = files.read()

    def credentials(self) -> grpc.ServerCredentials:
        """For one port of a server."""
        return grpc.dynamic_ssl_server_credentials(
            self._current.configuration(),
            self._changed,  # type: ignore[arg-type]  # None, for no change, is what gRPC documents
            require_client_authentication=self._files.client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, if there is one; gRPC asks at each new connection, on a thread of its own."""
        with self._lock:
            seen = self._files.fingerprint()
            if seen == self._seen:
                return None
            try:
                found = self._files.read()
            except CertificateError as error:
                logger.error("the certificate before stays in force: %s", error)  # noqa: TRY400 - one line says it
                self._seen = seen  # said once; the next change is looked at again
                return None
            self._seen, self._current = seen, found
            logger.info("new connections get the new certificate of %s", self._files.certificate)
            return found.configuration()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _bytes(path: Path, setting: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{setting}: {path}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise CertificateError(f"{setting}: {path} is not PEM; it has to have a line that starts with -----BEGIN")
    return content


def _check(files: CertificateFiles) -> None:
    """Shake hands with ourselves, in memory: what passes there, a client that trusts the certificate will accept."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself, whoever has signed it
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _refused(f"tls_certificate: {files.certificate} holds no certificate that can be read"):
        client.load_verify_locations(files.certificate)
    with _refused(f"tls_key: {files.key} holds no private key without a passphrase that can be read"):
        try:
            server.load_cert_chain(files.certificate, files.key, password=lambda: "")  # or OpenSSL asks the terminal
        except ssl.SSLError as error:
            if error.reason != "KEY_VALUES_MISMATCH":
                raise
            message = f"tls_key: {files.key} is not the key of the first certificate in {files.certificate}"
            raise CertificateError(message) from error
    if files.client_ca is not None:
        with _refused(f"tls_client_ca: {files.client_ca} holds no certificate that can be read"):
            server.load_verify_locations(files.client_ca)
    try:
        _shake_hands(client, server)
    except ssl.SSLCertVerificationError as error:
        trouble = _CERTIFICATE_TROUBLE.get(error.verify_code, f"is refused by clients: {error.verify_message}")
        raise CertificateError(f"tls_certificate: {files.certificate} {trouble}") from error
    except ssl.SSLError as error:
        raise CertificateError(f"tls_certificate: {files.certificate} cannot be used: {error.reason}") from error


@contextmanager
def _refused(message: str) -> Iterator[None]:
    """OpenSSL's error in words that an operator understands."""
    try:
        yield
    except OSError as error:  # ssl.SSLError is one
        raise CertificateError(message) from error


def _shake_hands(client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> None:
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
