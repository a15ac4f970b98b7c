"""Software bills of materials (SBOM) of the container's lock files and of an image, in the format CycloneDX 1.6."""

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.utils import canonicalize_name

from tools.container.lock import read_lock

PRODUCT = "llama2-grpc"


@dataclass(frozen=True)
class Lock:
    """A lock file: versions and dependencies by name; the direct ones are those of the product."""

    versions: dict[str, str]
    dependencies: dict[str, set[str]]

    @classmethod
    def read(cls, path: Path) -> "Lock":
        """Read the file. The comments that uv writes under an entry name the packages that require it."""
        versions = {name: str(pin.version) for name, pin in read_lock(path).items()}
        dependencies: dict[str, set[str]] = {name: set() for name in (PRODUCT, *versions)}
        for entry in re.split(r"^(?=\w)", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            name = str(canonicalize_name(entry.partition("==")[0]))
            if name in versions:
                for parent in re.findall(r"^    #(?: via|  ) +([\w.-]+)", entry, re.MULTILINE):
                    if (parent := str(canonicalize_name(parent))) in dependencies:
                        dependencies[parent].add(name)
        return cls(versions, dependencies)


def bill_of_materials(path: Path, version: str) -> str:
    """Return the SBOM of a lock file as JSON.

    Args:
        path: the lock file.
        version: the version of the product.

    Raises:
        ValueError: the SBOM does not match the schema of CycloneDX.
    """
    lock, bom = Lock.read(path), Bom()
    # The same lock file always has the same number.
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_OID, path.read_text(encoding="utf-8"))
    components = {name: _component(name, pinned) for name, pinned in lock.versions.items()}
    bom.components.update(components.values())
    product = Component(name=PRODUCT, version=version, type=ComponentType.APPLICATION, bom_ref=PRODUCT)
    bom.metadata.component = product
    components[PRODUCT] = product
    for name, dependencies in lock.dependencies.items():
        bom.register_dependency(components[name], [components[one] for one in sorted(dependencies)])
    return _checked(bom, path)


def distributions(packages: Path) -> dict[str, str]:
    """Return the version of each Python distribution in a site-packages folder, by its normalized name."""
    found = metadata.distributions(path=[str(packages)])
    return {str(canonicalize_name(one.metadata["Name"])): one.version for one in found}


def packages_of(root: Path) -> Path:
    """Return the site-packages folder of the environment in the files of an image.

    Raises:
        ValueError: the folder does not have exactly one.
    """
    found = list(root.glob("opt/llama2/lib/python*/site-packages"))
    if len(found) != 1:
        raise ValueError(f"{root}: expected one environment in opt/llama2, got {len(found)}; unpack the whole image")
    return found[0]


def bill_of_tree(root: Path, version: str) -> str:
    """Return the SBOM of the files of an image as JSON: its Python distributions and its Debian packages.

    Args:
        root: the root of the files.
        version: the version of the product.

    Raises:
        ValueError: the SBOM does not match the schema of CycloneDX.
    """
    bom = Bom()
    product = Component(name=PRODUCT, version=version, type=ComponentType.CONTAINER, bom_ref=PRODUCT)
    bom.metadata.component = product
    components = [_component(name, found) for name, found in sorted(distributions(packages_of(root)).items())]
    components += _debian_packages(root)
    bom.components.update(components)
    bom.register_dependency(product, components)
    # The same packages always have the same number.
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_OID, "\n".join(sorted(str(one.purl) for one in components)))
    return _checked(bom, root)


def _checked(bom: Bom, source: Path) -> str:
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    if (error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise ValueError(f"{source}: the SBOM does not match the schema: {error.data}")
    return text


def _debian_packages(root: Path) -> Iterator[Component]:
    """Yield the installed packages of Debian's package database."""
    status = (root / "var/lib/dpkg/status").read_text(encoding="utf-8")
    for entry in status.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in entry.splitlines() if line[:1].isalpha())
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            url = PackageURL("deb", "debian", name, version, {"arch": fields["Architecture"]})
            yield Component(name=name, version=version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url))


def _component(name: str, version: str) -> Component:
    url = PackageURL("pypi", name=name, version=version)
    return Component(name=name, version=version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url))
