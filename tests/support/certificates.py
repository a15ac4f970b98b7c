"""Certificates for tests, created during the test and written to files."""

from dataclasses import dataclass, field
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Authority:
    """A certificate authority that writes its certificates to files."""

    folder: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    @property
    def root(self) -> bytes:
        """The root certificate."""
        return self.ca.cert_pem.bytes()

    def root_file(self) -> Path:
        """Write the root certificate to a file, and return its path."""
        path = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(path)
        return path

    def write(self, certificate: trustme.LeafCert, folder: Path) -> tuple[Path, Path]:
        """Write a certificate with its chain, and its key, and return their paths."""
        paths = folder / "tls.crt", folder / "tls.key"
        paths[0].write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(paths[1])
        return paths

    def issue(self, name: str = "127.0.0.1", **options: object) -> trustme.LeafCert:
        """Issue a certificate for this name."""
        return self.ca.issue_cert(name, **options)  # type: ignore[arg-type]

    def pair(self, name: str = "127.0.0.1", **options: object) -> tuple[Path, Path]:
        """Issue a certificate, and write it and its key to the authority's folder."""
        return self.write(self.issue(name, **options), self.folder)
