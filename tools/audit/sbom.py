"""Software bills of materials (SBOM) of the container's lock files, in the format CycloneDX 1.6."""

import re
import uuid
from dataclasses import dataclass
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
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    if (error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise ValueError(f"{path}: the SBOM does not match the schema: {error.data}")
    return text


def _component(name: str, version: str) -> Component:
    url = PackageURL("pypi", name=name, version=version)
    return Component(name=name, version=version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url))
