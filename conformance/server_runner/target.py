"""The server under test: its addresses, and the API keys of the cases."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx2

from conformance.server_runner.suite import SuiteError

SINGLE = ("quota", "budget")
"""The roles with a key for each case."""
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),  # a retry would hide the first status
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(slots=True)
class Keys:
    """API keys by role, and keys of accounts that serve one case each."""

    roles: dict[str, str] = field(default_factory=dict)
    single: dict[str, list[str]] = field(default_factory=dict)
    """Keys by the role `quota` or `budget`."""

    @classmethod
    def read(cls, path: Path | None, main: str | None) -> "Keys":
        """Return the keys of a JSON file: a key by role, and a list of keys for each of the roles of SINGLE.

        Raises:
            SuiteError: the file is not such a file.
        """
        try:
            document: dict[str, Any] = {} if path is None else json.loads(path.read_text())
            single = {role: [str(key) for key in document.pop(role, [])] for role in SINGLE}
            roles = {role: str(key) for role, key in document.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise SuiteError(f"--keys: {path}: {error}") from error
        return cls(roles | ({} if main is None else {"main": main}), single)

    def key(self, role: str) -> str | None:
        """Return the key of a role; None sends none.

        Raises:
            SuiteError: the kit needs a key of this role and has none.
        """
        if role == "none" or (role == "main" and not self.roles):
            return None
        if role == "unknown":
            return f"l2_{'0' * 12}_{'A' * 43}"
        if self.single.get(role):
            return self.single[role].pop(0)
        if role not in self.roles:
            raise SuiteError(f"--keys: has no key for the role {role}; add it, or do not claim the profile")
        return self.roles[role]


@dataclass(slots=True)
class Target:
    """The server under test, with open connections."""

    address: str
    keys: Keys
    channel: grpc.aio.Channel
    http: httpx2.AsyncClient | None

    @classmethod
    def connect(cls, address: str, keys: Keys, json_url: str | None) -> "Target":
        """Open the channel, and the HTTP client if there is a URL; needs a running event loop."""
        http = None
        if json_url is not None:
            http = httpx2.AsyncClient(base_url=json_url, trust_env=False, timeout=30)
        return cls(address, keys, grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), http)

    async def close(self) -> None:
        """Close the connections."""
        await self.channel.close()
        if self.http is not None:
            await self.http.aclose()
