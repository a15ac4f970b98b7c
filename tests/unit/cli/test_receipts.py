"""`llama2-server receipts`, and the errors of key files at the start."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.cli.runner import error, output

from llama2_server.configuration_error import ConfigurationError
from llama2_server.receipts.keys import public_file, read_keys, write_new_key


def test_keygen_writes_a_private_key_and_its_public_key(tmp_path: Path) -> None:
    """Only the owner can read the key; a second call never replaces it."""
    file = tmp_path / "receipts.key"
    key_id = output("receipts", "keygen", str(file)).strip()
    assert file.stat().st_mode & 0o777 == 0o600
    keys = read_keys(file, None)
    assert keys.public.key_id == key_id
    assert keys.listed == (keys.public,)
    before = file.read_bytes()
    assert error("receipts", "keygen", str(file)).startswith(f"{public_file(file)}: exists; choose another name")
    assert file.read_bytes() == before
    public_file(file).unlink()
    assert error("receipts", "keygen", str(file)).startswith(f"{file}: exists; choose another name")
    assert not public_file(file).exists()
    missing = tmp_path / "missing" / "receipts.key"
    assert error("receipts", "keygen", str(missing)).endswith("No such file or directory; choose another directory")


def test_the_directory_may_contain_the_current_key(tmp_path: Path) -> None:
    """The current public key is listed once, first; other files of the directory are ignored."""
    for name in ("a", "b", "c"):
        write_new_key(tmp_path / name)
    keys = read_keys(tmp_path / "b", tmp_path)
    assert [key.raw for key in keys.listed] == [read_keys(tmp_path / name, None).public.raw for name in ("b", "a", "c")]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="NOT TESTED: openssl is not installed")
def test_a_key_of_openssl_is_accepted(tmp_path: Path) -> None:
    """The file format is OpenSSL's; a key of another kind, or with a password, is an error."""

    def genpkey(name: str, *flags: str) -> Path:
        subprocess.run(["openssl", "genpkey", "-out", tmp_path / name, *flags], check=True, capture_output=True)
        return tmp_path / name

    assert read_keys(genpkey("good", "-algorithm", "ed25519"), None).public.key_id
    with_password = genpkey("password", "-algorithm", "ed25519", "-aes256", "-pass", "pass:secret")
    for file in (genpkey("x25519", "-algorithm", "x25519"), with_password):
        with pytest.raises(ConfigurationError, match=f"--receipt-key: {file} is not an Ed25519 private key"):
            read_keys(file, None)


def test_files_without_a_key_stop_the_start(tmp_path: Path) -> None:
    """Each error names the flag, the file and what to do."""
    key, text = tmp_path / "receipts.key", tmp_path / "text.pub"
    write_new_key(key)
    text.write_text("no key")
    start = ("serve", "--listen", "127.0.0.1:0", "--data-directory", str(tmp_path / "data"))
    assert f"--receipt-key: {text} is not an Ed25519 private key in PEM" in error(*start, "--receipt-key", str(text))
    missing = str(tmp_path / "missing")
    assert f"--receipt-key: {missing} cannot be read: {os.strerror(2)}" in error(*start, "--receipt-key", missing)
    with_key = (*start, "--receipt-key", str(key), "--receipt-public-keys")
    assert f"--receipt-public-keys: {text} is not an Ed25519 public key" in error(*with_key, str(tmp_path))
    assert f"--receipt-public-keys: {missing} cannot be read" in error(*with_key, missing)
    assert "--receipt-public-keys: needs --receipt-key" in error(*start, "--receipt-public-keys", str(tmp_path))
