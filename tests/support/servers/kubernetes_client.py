"""A client of a Kubernetes API server, which also returns the server's warnings."""

import json
import re
import ssl
from collections.abc import Iterator
from typing import Any, TypeAlias

import httpx2

Manifest: TypeAlias = dict[str, Any]

# The form of a warning is `299 - "text"`; quotation marks and backslashes in the text are escaped.
WARNING = re.compile(r'299 \S+ "(?P<text>.*)"')


class RejectedByServer(Exception):
    """The API server has rejected a request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class KubernetesClient:
    """Reads and writes objects, with the rights of a client certificate."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        self._http = httpx2.Client(base_url=url, verify=context, timeout=60, trust_env=False)
        self._resources: dict[str, dict[str, Manifest]] = {}

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @property
    def ready(self) -> bool:
        """Whether the server answers and is ready."""
        try:
            return self._http.get("/readyz").is_success
        except httpx2.TransportError:
            return False

    @property
    def discovery(self) -> str:
        """The document that lists all kinds outside of the core group, as JSON text."""
        accepted = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
        return self._http.get("/apis", headers={"accept": accepted}).text

    def request(self, method: str, path: str, body: object = None, **parameters: str) -> tuple[Manifest, list[str]]:
        """Send a request, and return the object of the answer and the warnings.

        Raises:
            RejectedByServer: the status of the answer is not 2xx.
        """
        content_type = "application/merge-patch+json" if method == "PATCH" else "application/json"
        content = None if body is None else json.dumps(body)
        headers = {"content-type": content_type}
        answer = self._http.request(method, path, params=parameters, content=content, headers=headers)
        if not answer.is_success:
            is_json = answer.headers.get("content-type") == "application/json"  # not if the path is unknown
            raise RejectedByServer(answer.status_code, answer.json()["message"] if is_json else answer.text)
        warnings = [WARNING.fullmatch(header) for header in answer.headers.get_list("warning")]
        return answer.json(), [found["text"] if found else "unknown form" for found in warnings]

    def serves(self, manifest: Manifest) -> bool:
        """Return whether the server has the kind of a manifest."""
        return self._resource(manifest["apiVersion"], manifest["kind"]) is not None

    def collection(self, api_version: str, kind: str, namespace: str | None = None) -> str:
        """Return the path of the objects of a kind, in a namespace if the kind has namespaces."""
        resource = self._resource(api_version, kind)
        assert resource is not None, f"the server has no {kind} of {api_version}"
        scope = f"/namespaces/{namespace}" if resource["namespaced"] else ""
        return f"{_group(api_version)}{scope}/{resource['name']}"

    def create(self, manifest: Manifest, *, dry_run: bool = False) -> list[str]:
        """Create an object, or only check it, and return the warnings; unknown fields are errors."""
        path = self.collection(manifest["apiVersion"], manifest["kind"], manifest["metadata"].get("namespace"))
        parameters = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self.request("POST", path, manifest, **parameters)[1]

    def list(self, api_version: str, kind: str, namespace: str, **parameters: str) -> list[Manifest]:
        """Return the objects of a kind in a namespace."""
        items = self.request("GET", self.collection(api_version, kind, namespace), **parameters)[0]["items"]
        return [{"apiVersion": api_version, "kind": kind, **item} for item in items]

    def watch(self, path: str, version: str, seconds: int) -> Iterator[tuple[str, Manifest]]:
        """Yield the changes of a collection after a version, each with its type, for at most these seconds."""
        parameters = {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(seconds)}
        with self._http.stream("GET", path, params=parameters, timeout=None) as answer:
            for line in answer.iter_lines():
                event = json.loads(line)
                yield event["type"], event["object"]

    def _resource(self, api_version: str, kind: str) -> Manifest | None:
        """Return how the server names a kind, or None if it does not have it."""
        if api_version not in self._resources:
            try:
                listed = self.request("GET", _group(api_version))[0]["resources"]
            except RejectedByServer as error:
                if error.status != httpx2.codes.NOT_FOUND:
                    raise
                return None
            # Subresources, such as `pods/log`, have other kinds.
            self._resources[api_version] = {entry["kind"]: entry for entry in listed if "/" not in entry["name"]}
        return self._resources[api_version].get(kind)


def _group(api_version: str) -> str:
    """Return the path of a version of a group; the core group has none in its version."""
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
