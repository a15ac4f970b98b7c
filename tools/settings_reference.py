"""Writes docs/settings.md from the server's own settings object, or checks that it is up to date (`--check`)."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2_server.config.settings import ENV_PREFIX, Settings

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = f"""\
# Settings

<!-- Written by `make docs` from server/llama2_server/config/settings.py; `make check` fails when it is stale. -->

Every setting is a key of the YAML file that `--config` names, a variable in the environment and a flag; the
environment wins over the file, and flags win over both: `max_queue_size: 64` in the file,
`{ENV_PREFIX}MAX_QUEUE_SIZE=64`, `--max-queue-size 64`. As flags, true and false are `--reflection` and
`--no-reflection`. An empty variable counts as
unset.

A key that does not exist, a wrong value and an impossible pair are refused before anything is loaded, in one line
each. `llama2-server settings`, with the same flags and environment, prints the values in force with their sources,
secrets masked.

| key | value | default | |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    properties: Mapping[str, Any] = Settings.model_json_schema()["properties"]
    return HEAD + "".join(map(_row, properties, properties.values()))


def _row(key: str, schema: Mapping[str, Any]) -> str:
    description = Settings.model_fields[key].description
    return f"| `{key}` | {_value(schema)} | {_default(key)} | {description} |\n"


def _value(schema: Mapping[str, Any]) -> str:
    """What is allowed, in words."""
    if "anyOf" in schema:
        (kind,) = (kind for kind in schema["anyOf"] if kind["type"] != "null")
        return _value(kind)
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    formats = {"path": "path", "password": "text, secret"}
    types = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    words = formats.get(schema.get("format", ""), types[schema["type"]])
    if "minimum" in schema:
        return f"{words}, {schema['minimum']} or more"
    return f"{words}, above {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else words


def _default(key: str) -> str:
    field = Settings.model_fields[key]
    if field.default_factory is not None:
        return "`~/.local/state/llama2-grpc`"
    if field.default is None:
        return ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def main() -> None:
    """Write the page, or with `--check` exit 1 if it is stale."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/settings.md is stale: run `make docs`")


if __name__ == "__main__":
    main()
