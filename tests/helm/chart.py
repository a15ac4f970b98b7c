"""The chart, rendered by Helm's engine, and helpers that read the manifests."""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import helm_python
import pytest
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import all_versions, major_minor, schema_contents
from referencing import Registry, Resource
from tools.chart import CHART

from llama2_server.card import ModelCard, load_card, parse_card
from llama2_server.config.settings import Settings

Manifest: TypeAlias = dict[str, Any]
Values: TypeAlias = dict[str, Any]

NAMESPACE = "text"
VALUE_SETS = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))


@cache
def chart() -> helm_python.Chart:
    """Load the chart once."""
    return helm_python.Chart.load(CHART)


def values_of(value_set: str) -> Values:
    """Return a value set under `ci`."""
    values: Values = yaml.safe_load((CHART / "ci" / f"{value_set}.yaml").read_text(encoding="utf-8"))
    return values


def render(values: Values, release: str = "llama2") -> "Rendered":
    """Render an install with these values; raise HelmError if they are invalid."""
    return Rendered(chart().render(values, name=release, namespace=NAMESPACE), merged=chart().merge_values(values))


@cache
def rendered(value_set: str) -> "Rendered":
    """Render a value set under `ci`."""
    return render(values_of(value_set))


@cache
def _definitions(folder: str) -> Registry[Any]:
    """Return the definitions of a version of Kubernetes, which take most of the time to read."""
    contents = schema_contents(f"kubernetes-json-schema/{folder}/_definitions.json", folder)
    return (Resource.from_contents(contents) @ Registry()).crawl()


@cache
def _validator(kind: str, api_version: str, kubernetes: str) -> Draft202012Validator:
    folder = next(f"v{version}-local-strict" for version in all_versions() if major_minor(version) == kubernetes)
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = schema_contents(f"kubernetes-json-schema/{folder}/{kind.lower()}-{group}.json", kubernetes)
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(folder))


def validate(manifest: Manifest, kubernetes: str = "1.37") -> None:
    """Check a manifest strictly, as `kubernetes_validate.validate` does, which reads all schemas for each manifest.

    Raises:
        jsonschema.ValidationError: it is not valid.
    """
    _validator(manifest["kind"], manifest["apiVersion"], kubernetes).validate(manifest)


class Rendered:
    """The manifests and notes of an install."""

    def __init__(self, files: dict[str, str], merged: Values) -> None:
        self.values = merged
        self.notes = files.pop("llama2/templates/NOTES.txt")
        self.by_template = {
            Path(path).relative_to("llama2/templates").as_posix(): [
                manifest for manifest in yaml.safe_load_all(text) if manifest is not None
            ]
            for path, text in files.items()
        }
        self.manifests = [manifest for manifests in self.by_template.values() for manifest in manifests]

    def of(self, kind: str) -> list[Manifest]:
        """Return all manifests of a kind."""
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str) -> Manifest:
        """Return the only manifest of a kind."""
        (manifest,) = self.of(kind)
        return manifest

    def component(self, kind: str, component: str = "server") -> Manifest:
        """Return the only manifest of a kind of a part of the release: `server` or `envoy`."""
        label = {"app.kubernetes.io/component": component}
        (manifest,) = [manifest for manifest in self.of(kind) if selects(label, manifest)]
        return manifest

    @property
    def workload(self) -> Manifest:
        """The StatefulSet or Deployment of the server."""
        return self.component("StatefulSet" if self.of("StatefulSet") else "Deployment")

    @property
    def envoys(self) -> list[Manifest]:
        """The pod templates of Envoy, if it is enabled."""
        label = {"app.kubernetes.io/component": "envoy"}
        return [found["spec"]["template"] for found in self.of("Deployment") if selects(label, found)]

    @property
    def pod(self) -> Manifest:
        """The pod template of the server."""
        template: Manifest = self.workload["spec"]["template"]
        return template

    @property
    def server(self) -> Manifest:
        """The server's container."""
        (container,) = self.pod["spec"]["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def env(self) -> dict[str, Any]:
        """The server's environment: values, or references to their sources."""
        return environment_of(self.server)

    @property
    def test_pods(self) -> list[Manifest]:
        """The pods of `helm test`."""
        return self.of("Pod")

    def pods(self) -> Iterator[Manifest]:
        """Yield the server's pod, Envoy's, the test pods and the pods of Jobs."""
        yield self.pod
        yield from self.envoys
        yield from self.test_pods
        yield from (job["spec"]["template"] for job in self.of("Job"))

    def services(self) -> Iterator[tuple[Manifest, Manifest]]:
        """Yield the server's normal and headless Service, each with its spec."""
        for service in self.of("Service"):
            if selects({"app.kubernetes.io/component": "server"}, service):
                yield service, service["spec"]


def environment_of(container: Manifest) -> dict[str, Any]:
    """Return a container's environment: values, or references to their sources."""
    entries = container.get("env", [])
    environment = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}
    assert len(environment) == len(entries), "a variable is defined twice"
    return environment


def volumes_of(release: Rendered, pod: Manifest) -> list[Manifest]:
    """Return a pod's volumes, with those that a StatefulSet adds from its claim templates."""
    templates = release.workload["spec"].get("volumeClaimTemplates", []) if pod is release.pod else []
    claims = [{"name": claim["metadata"]["name"], "claimTemplate": claim} for claim in templates]
    return [*pod["spec"].get("volumes", []), *claims]


def containers_of(pod: Manifest) -> list[Manifest]:
    """Return all containers of a pod, init containers included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def selects(labels: dict[str, str], manifest: Manifest) -> bool:
    """Return whether a selector with these labels matches a manifest."""
    return bool(labels.items() <= manifest["metadata"]["labels"].items())


def settings_of(release: Rendered, secrets: dict[str, str] | None = None) -> Settings:
    """Return the settings of a server with the rendered environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("LLAMA2_")]:
            patch.delenv(name)
        for name, value in release.env.items():
            if name.startswith("LLAMA2_"):
                patch.setenv(name, value if isinstance(value, str) else (secrets or {}).get(name, "x://y"))
        return Settings.model_validate({})


def card_of(release: Rendered) -> ModelCard:
    """Return the card that the server reads."""
    if release.env["LLAMA2_CARD"] == "demo":
        return load_card("demo")
    (card,) = (found for found in release.of("ConfigMap") if found["metadata"]["name"].endswith("-card"))
    return parse_card(card["data"]["card.yaml"])
