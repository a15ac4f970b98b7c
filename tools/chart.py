"""Bring what the Helm chart has from the server up to date: the shipped cards, and the schema of `settings`.

`python -m tools.chart` writes both; a test says when that is due.
"""

import json
from pathlib import Path
from typing import Any

from llama2_server.config.settings import Settings

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm/llama2"
CARDS = ROOT / "server/llama2_server/cards"
SCHEMA = CHART / "values.schema.json"
# What the chart decides itself, from its other values.
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
    "redis_url",
    "tls_certificate",
    "tls_client_ca",
    "tls_key",
    "weights",
}
LINE = 116


def settings_schema() -> dict[str, Any]:
    """The JSON Schema of the values under `settings`: all settings but the chart's own, by their names and types."""
    fields = Settings.model_json_schema()["properties"]
    ours = {name: _plain(field) for name, field in fields.items() if name not in CHART_SETTINGS}
    return {"type": "object", "additionalProperties": False, "properties": ours}


def values_schema() -> str:
    """The text of values.schema.json with the settings of today."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return _text(schema) + "\n"


def cards() -> dict[Path, str]:
    """What the chart's copies of the shipped cards have to be: Helm reads no file outside a chart."""
    return {CHART / "files/cards" / card.name: card.read_text(encoding="utf-8") for card in CARDS.glob("*.yaml")}


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without what Helm's users need not know: titles, defaults, and null for what may be left out."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    keys = ("type", "enum", "minimum", "exclusiveMinimum")
    return {"description": field["description"]} | {key: kinds[0][key] for key in keys if key in kinds[0]}


def _text(node: Any, indent: int = 0) -> str:
    """JSON with everything on one line that fits on one."""
    flat = json.dumps(node, ensure_ascii=False)
    if len(flat) + indent <= LINE or not isinstance(node, dict | list):
        return flat
    pad, end = " " * (indent + 2), " " * indent
    if isinstance(node, dict):
        items = [f"{pad}{json.dumps(key)}: {_text(value, indent + 2)}" for key, value in node.items()]
        return "{\n" + ",\n".join(items) + f"\n{end}}}"
    return "[\n" + ",\n".join(pad + _text(item, indent + 2) for item in node) + f"\n{end}]"


def main() -> None:
    """Write the files."""
    for path, text in {SCHEMA: values_schema(), **cards()}.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
