"""A server with the part of the Hugging Face Hub's API that downloads use, on a loopback port.

Each repository is a dict of files. Large files are stored by Git LFS: the API lists their SHA-256 and size.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class Repository:
    """A model repository at its current commit."""

    files: dict[str, bytes]
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the API states in place of the true ones."""
    commit: str = COMMIT
    gated: bool = False
    """Whether the license must be accepted, which this account has not done."""
    fails_after: int | None = None
    """Number of files after which downloads fail."""
    damaged: set[str] = field(default_factory=set)
    """Files whose first byte changes on the way."""

    def size(self, name: str) -> int:
        return self.sizes.get(name, len(self.files[name]))

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """Return the metadata of a file."""
        digest, size = self.sha256(name), self.size(name)
        content = self.files[name]
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
        entry: dict[str, Any] = {"size": size, "oid": blob, "blobId": blob}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 134}
        return entry


class HubServer:
    """Repositories by id, and the paths that clients have requested."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.downloads: list[str] = []
        """Names of the files that were sent, in order."""
        self.before_download = threading.Event()
        """Downloads wait for it."""
        self.before_download.set()
        self.downloading = threading.Event()
        """Set by the first download."""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of a request."""
        self.requests.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository_id = "/".join(parts[2:4] if api else parts[:2])
        repository = self.repositories.get(repository_id)
        if repository is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if api:
            return _metadata(repository, repository_id, parts[4:])
        if repository.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        return self._file(repository, method, "/".join(parts[4:]))

    def _file(self, repository: Repository, method: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in repository.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        entry = repository.entry(name)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit}
        if method == "GET":
            self.downloading.set()
            self.before_download.wait(30)
            if repository.fails_after is not None and len(self.downloads) >= repository.fails_after:
                return 400, {"X-Error-Message": "the test rejects this file"}, b""
            self.downloads.append(name)
        content = repository.files[name]
        if name in repository.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        return 200, headers, content


def _metadata(repository: Repository, repository_id: str, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
    if parts[:1] == ["auth-check"]:
        return (403, {"X-Error-Code": "GatedRepo"}, b"") if repository.gated else (200, {}, b"{}")
    if parts and unquote(parts[1]) not in ("main", repository.commit):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    content: Any
    if parts[:1] == ["tree"]:
        content = [{"type": "file", "path": name, **repository.entry(name)} for name in repository.files]
    else:
        siblings = [{"rfilename": name, **repository.entry(name)} for name in repository.files]
        gated = "manual" if repository.gated else False
        content = {"id": repository_id, "sha": repository.commit, "siblings": siblings, "gated": gated}
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that is killed closes its connections


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Run the server on a free port during the body."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            status, headers, body = hub.answer(self.command, urlsplit(self.path).path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = _answer  # noqa: N815 - names of the base class

        def log_message(self, *_: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.before_download.set()
            server.shutdown()
            thread.join()
