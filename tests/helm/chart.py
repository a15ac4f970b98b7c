"""The chart as Helm's own engine renders it, and what the tests of it look for in the manifests."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import helm_python
import yaml
from tools.chart import CHART

Manifest: TypeAlias = dict[str, Any]
Values: TypeAlias = dict[str, Any]

NAMESPACE = "text"
VALUE_SETS = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))


@cache
def chart() -> helm_python.Chart:
    """The chart, loaded once."""
    return helm_python.Chart.load(CHART)


def values_of(value_set: str) -> Values:
    """One of the value sets under `ci`."""
    values: Values = yaml.safe_load((CHART / "ci" / f"{value_set}.yaml").read_text(encoding="utf-8"))
    return values


def render(values: Values, release: str = "llama2") -> "Rendered":
    """The manifests of an install with these values; HelmError where they are refused."""
    return Rendered(chart().render(values, name=release, namespace=NAMESPACE), merged=chart().merge_values(values))


@cache
def rendered(value_set: str) -> "Rendered":
    """The manifests of a value set under `ci`."""
    return render(values_of(value_set))


class Rendered:
    """What one install consists of."""

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
        """All manifests of a kind."""
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str) -> Manifest:
        """The only manifest of a kind."""
        (manifest,) = self.of(kind)
        return manifest

    @property
    def pod(self) -> Manifest:
        """The server's pod, as the Deployment makes it."""
        template: Manifest = self.one("Deployment")["spec"]["template"]
        return template

    @property
    def server(self) -> Manifest:
        """The server's container."""
        (container,) = self.pod["spec"]["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def env(self) -> dict[str, Any]:
        """The server's environment: texts, or where they come from."""
        return environment_of(self.server)

    @property
    def test_pods(self) -> list[Manifest]:
        """The pods of `helm test`."""
        return self.of("Pod")

    def pods(self) -> Iterator[Manifest]:
        """Every pod there will be."""
        yield self.pod
        yield from self.test_pods

    def services(self) -> Iterator[tuple[Manifest, Manifest]]:
        """The normal Service and the headless one."""
        for service in self.of("Service"):
            yield service, service["spec"]


def environment_of(container: Manifest) -> dict[str, Any]:
    """A container's environment: texts, or where they come from."""
    entries = container.get("env", [])
    environment = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}
    assert len(environment) == len(entries), "a variable stands there twice"
    return environment


def containers_of(pod: Manifest) -> list[Manifest]:
    """All containers of a pod, the ones that run first included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def selects(labels: dict[str, str], manifest: Manifest) -> bool:
    """Whether a selector by these labels takes a manifest."""
    return bool(labels.items() <= manifest["metadata"]["labels"].items())
