"""Update the Helm chart's copies of the shipped model cards, of Envoy's configuration and of the schema of `settings`.

`python -m tools.chart` writes them; a test fails if they are out of date.
"""

import json
from pathlib import Path
from typing import Any

from examples.envoy.descriptors import descriptor_set

from llama2_server.config.settings import Settings, description_of

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm/llama2"
CARDS = ROOT / "server/llama2_server/cards"
ENVOY = ROOT / "examples/envoy"
SCHEMA = CHART / "values.schema.json"
# Settings that the chart derives from its other values.
CHART_SETTINGS = {
    "allow_unauthenticated",
    "card",
    "config",
    "max_connection_age_grace_seconds",
    "data_directory",
    "device",
    "shutdown_grace_seconds",
    "health_listen",
    "api_keys_file",
    "usage_url",
    "listen",
    "metrics_listen",
    "receipt_key",
    "receipt_public_keys",
    "redis_url",
    "tls_certificate",
    "tls_client_ca",
    "tls_key",
    "weights",
}
MAX_LINE_CHARACTERS = 116


def settings_schema() -> dict[str, Any]:
    """Return the JSON Schema of the values under `settings`: all settings except CHART_SETTINGS."""
    fields = Settings.model_json_schema()["properties"]
    properties = {key: _property(key, field) for key, field in fields.items() if key not in CHART_SETTINGS}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def values_schema() -> str:
    """Return the text of values.schema.json with the current settings."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return _text(schema) + "\n"


def copies() -> dict[Path, bytes]:
    """Return the chart's copies by path: the cards and Envoy's files. Helm cannot read files outside a chart."""
    files = {CHART / "files/cards" / card.name: card.read_bytes() for card in CARDS.glob("*.yaml")}
    files |= {CHART / "files/envoy" / name: (ENVOY / name).read_bytes() for name in ("envoy.yaml", "json.lua")}
    return files | {CHART / "files/envoy/llama2.pb": descriptor_set().SerializeToString(deterministic=True)}


def _property(key: str, field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a setting without titles, defaults and null, which users of the chart do not need."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    kept = ("type", "enum", "minimum", "exclusiveMinimum")
    return {"description": description_of(key)} | {name: kinds[0][name] for name in kept if name in kinds[0]}


def _text(node: Any, indent: int = 0) -> str:
    """Return JSON in which each value that fits is on one line."""
    flat = json.dumps(node, ensure_ascii=False)
    if len(flat) + indent <= MAX_LINE_CHARACTERS or not isinstance(node, dict | list):
        return flat
    pad, end = " " * (indent + 2), " " * indent
    if isinstance(node, dict):
        items = [f"{pad}{json.dumps(key)}: {_text(value, indent + 2)}" for key, value in node.items()]
        return "{\n" + ",\n".join(items) + f"\n{end}}}"
    return "[\n" + ",\n".join(pad + _text(item, indent + 2) for item in node) + f"\n{end}]"


def main() -> None:
    """Write the schema and the copies."""
    for path, content in {SCHEMA: values_schema().encode(), **copies()}.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
