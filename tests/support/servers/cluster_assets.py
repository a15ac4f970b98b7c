"""Programs and schemas of a Kubernetes cluster, which no package index has: `CLUSTER_ASSETS` names their folder.

`bin` has kube-apiserver, and `crds` has the CustomResourceDefinitions of other projects as YAML files. CONTRIBUTING.md
says where they come from.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

VARIABLE = "CLUSTER_ASSETS"
REASON = f"NOT TESTED WITH A CLUSTER: {VARIABLE} is not set (CONTRIBUTING.md describes the folder that it names)"


def assets() -> Path | None:
    """Return the folder, or None if the variable is not set."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else None


def definitions(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the CustomResourceDefinitions of a folder of assets."""
    for path in sorted((folder / "crds").glob("*.yaml")):
        for manifest in yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if manifest and manifest["kind"] == "CustomResourceDefinition":
                yield manifest


def schema_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the strict schema of a manifest of another project; skip the test without its definition."""
    folder = assets()
    if folder is None:
        pytest.skip(REASON)
    for definition in definitions(folder):
        for version in definition["spec"]["versions"]:
            group = f"{definition['spec']['group']}/{version['name']}"
            if (group, definition["spec"]["names"]["kind"]) == (manifest["apiVersion"], manifest["kind"]):
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"] |= {"metadata": {"type": "object"}}
                return schema
    pytest.skip(f"NOT TESTED WITH A CLUSTER: {folder / 'crds'} has no {manifest['kind']} of {manifest['apiVersion']}")


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that rejects unknown fields, as an API server does with strict validation."""
    schema = {key: strict_part(key, part) for key, part in schema.items()}
    open_ended = {"additionalProperties", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource"}
    if "properties" in schema and not open_ended & set(schema):
        schema["additionalProperties"] = False
    return schema


def strict_part(key: str, part: Any) -> Any:
    """Return the strict form of a part of a schema; `allOf` and the like have no fields of their own."""
    if key == "properties":
        return {name: strict(field) for name, field in part.items()}
    if key in {"items", "additionalProperties"} and isinstance(part, dict):
        return strict(part)
    return part
