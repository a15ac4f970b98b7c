"""The Ed25519 keys of receipts: files in PEM, as `openssl genpkey -algorithm ed25519` writes them, too."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from llama2_server.configuration_error import ConfigurationError

PUBLIC_SUFFIX = ".pub"
KEY_ID_DIGITS = 16
PRIVATE_MODE = 0o600
KEYGEN = "make a key with `llama2-server receipts keygen FILE`"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that verifies receipts."""

    key_id: str
    raw: bytes
    """The 32 bytes of RFC 8032."""

    @classmethod
    def of(cls, key: Ed25519PublicKey) -> "PublicKey":
        """Return the key with its id: the first 16 hexadecimal digits of its SHA-256."""
        raw = key.public_bytes_raw()
        return cls(hashlib.sha256(raw).hexdigest()[:KEY_ID_DIGITS], raw)


@dataclass(frozen=True, slots=True)
class ReceiptKeys:
    """The key that signs, and the public keys of all receipts that clients may still have."""

    signing: Ed25519PrivateKey
    public: PublicKey
    """The public key of `signing`."""
    listed: tuple[PublicKey, ...]
    """All public keys, with that of `signing` first."""


def read_keys(key_file: Path, public_directory: Path | None) -> ReceiptKeys:
    """Read the signing key, and every file `*.pub` of the directory.

    Raises:
        ConfigurationError: a file is missing, unreadable or has no Ed25519 key.
    """
    signing = _signing_key(key_file)
    public = PublicKey.of(signing.public_key())
    files = [] if public_directory is None else _public_files(public_directory)
    listed = dict.fromkeys([public, *(PublicKey.of(_public_key(file)) for file in files)])
    return ReceiptKeys(signing, public, tuple(listed))


def write_new_key(file: Path) -> PublicKey:
    """Write a new key to `file`, which only its owner may read, and its public key next to it, with `.pub` added.

    Raises:
        ConfigurationError: one of the files exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write_new(public_file(file), public, 0o644)
    try:
        _write_new(file, private, PRIVATE_MODE)
    except ConfigurationError:
        public_file(file).unlink()
        raise
    return PublicKey.of(key.public_key())


def public_file(file: Path) -> Path:
    """Return the file of the public key that belongs to a key file."""
    return file.with_name(file.name + PUBLIC_SUFFIX)


def _write_new(file: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
    except FileExistsError:
        raise ConfigurationError(f"{file}: exists; choose another name, because receipts need their old keys") from None
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be written: {error.strerror}; choose another directory") from error


def _signing_key(file: Path) -> Ed25519PrivateKey:
    data = _read("--receipt-key", file)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: the key has a password
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(
            f"--receipt-key: {file} is not an Ed25519 private key in PEM without password; {KEYGEN}"
        )
    return key


def _public_key(file: Path) -> Ed25519PublicKey:
    data = _read("--receipt-public-keys", file)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError(f"--receipt-public-keys: {file} is not an Ed25519 public key in PEM; remove the file")
    return key


def _public_files(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == PUBLIC_SUFFIX)
    except OSError as error:
        reason = error.strerror
        raise ConfigurationError(f"--receipt-public-keys: {directory} cannot be read: {reason}; correct it") from error


def _read(flag: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{flag}: {file} cannot be read: {error.strerror}; {KEYGEN}") from error
