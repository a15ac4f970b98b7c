"""API keys of the kit's accounts, in the format of `llama2-server keys new` (docs/accounts.md)."""

import hashlib
import hmac
import json
import secrets
from pathlib import Path

ROLES = {"main": True, "other": True, "disabled": False}
"""The roles, and whether their accounts are enabled."""
QUOTA_ACCOUNTS = 3000
"""Accounts with the card's default quota: each case of the profile `quota` uses up one or two."""


def write_keys(server_file: Path, kit_file: Path) -> None:
    """Write the keys file of the server, and the file of `--keys` with the keys by role."""
    lines, roles = ["keys:"], {}
    for account, enabled in ROLES.items():
        roles[account] = _add_key(lines, account, enabled)
    quota = [_add_key(lines, f"quota{number}", True) for number in range(QUOTA_ACCOUNTS)]
    server_file.write_text("\n".join(lines) + "\n")
    kit_file.write_text(json.dumps(roles | {"quota": quota}))


def _add_key(lines: list[str], account: str, enabled: bool) -> str:
    key_id, salt = secrets.token_hex(6), secrets.token_hex(16)
    key = f"l2_{key_id}_{secrets.token_urlsafe(32)}"
    digest = hmac.new(bytes.fromhex(salt), key.encode(), hashlib.sha256).hexdigest()
    status = str(enabled).lower()
    lines.append(
        f"  '{key_id}': {{account: {account}, name: '', enabled: {status}, salt: '{salt}', digest: '{digest}'}}"
    )
    return key
