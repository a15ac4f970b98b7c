"""API keys of the kit's accounts, in the format of `llama2-server keys new` (docs/accounts.md)."""

import hashlib
import hmac
import json
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

ROLES = {"main": True, "other": True, "disabled": False}
"""The roles, and whether their accounts are enabled."""
SINGLE = {"quota": 5000, "budget": 3000}
"""Accounts of one case each: with the card's default quota, or with these limits."""
BUDGET = "{requests_per_minute: 5, neurons_per_month: '1000'}"


def write_keys(server_file: Path, kit_file: Path) -> None:
    """Write the keys file of the server, and the file of `--keys` with the keys by role."""
    lines, roles = ["keys:"], {}
    for account, enabled in ROLES.items():
        roles[account] = _add_key(lines, account, enabled)
    single = {
        role: [_add_key(lines, f"{role}{number}", True) for number in range(count)] for role, count in SINGLE.items()
    }
    lines += ["accounts:", *(f"  budget{number}: {BUDGET}" for number in range(SINGLE["budget"]))]
    server_file.write_text("\n".join(lines) + "\n")
    kit_file.write_text(json.dumps(roles | single))


def write_receipt_key(file: Path) -> None:
    """Write a new private key that signs receipts."""
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.touch(mode=0o600)
    file.write_bytes(pem)


def _add_key(lines: list[str], account: str, enabled: bool) -> str:
    key_id, salt = secrets.token_hex(6), secrets.token_hex(16)
    key = f"l2_{key_id}_{secrets.token_urlsafe(32)}"
    digest = hmac.new(bytes.fromhex(salt), key.encode(), hashlib.sha256).hexdigest()
    status = str(enabled).lower()
    lines.append(
        f"  '{key_id}': {{account: {account}, name: '', enabled: {status}, salt: '{salt}', digest: '{digest}'}}"
    )
    return key
