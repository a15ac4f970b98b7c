"""Certificates for tests, as files, made on the spot."""

from dataclasses import dataclass, field
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and files of what it issues."""

    folder: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    @property
    def root(self) -> bytes:
        """Its own certificate."""
        return self.ca.cert_pem.bytes()

    def root_file(self) -> Path:
        """Its own certificate as a file."""
        path = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(path)
        return path

    def write(self, certificate: trustme.LeafCert, folder: Path) -> tuple[Path, Path]:
        """A certificate with its chain, and its key, as files."""
        paths = folder / "tls.crt", folder / "tls.key"
        paths[0].write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(paths[1])
        return paths

    def issue(self, name: str = "127.0.0.1", **options: object) -> trustme.LeafCert:
        """A certificate of this name."""
        return self.ca.issue_cert(name, **options)  # type: ignore[arg-type]

    def pair(self, name: str = "127.0.0.1", **options: object) -> tuple[Path, Path]:
        """A new certificate and its key, as files in the authority's folder."""
        return self.write(self.issue(name, **options), self.folder)
