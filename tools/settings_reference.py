"""Write docs/settings.md from the server's settings, or check that it is up to date (`--check`)."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2_server.config.settings import ENV_PREFIX, Group, Settings, default_of, description_of, group_of

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = f"""\
# Settings

<!-- Written by `make docs` from server/llama2_server/config/settings.py; `make check` fails if it is out of date. -->

Every setting is a key of the YAML file that `--config` names, an environment variable and a flag:
`max_queue_size: 64` in the file, `{ENV_PREFIX}MAX_QUEUE_SIZE=64`, `--max-queue-size 64`. Flags override the
environment, and the environment overrides the file. The flags for true and false are `--reflection` and
`--no-reflection`. An empty variable counts as unset.

The server rejects unknown keys, wrong values and values that exclude each other before it loads anything. It prints
one line per error and exits with code 2. `llama2-server settings`, with the same flags and environment, prints the
values in force with their sources, secrets masked. `llama2-server --help` lists the flags in the groups of this page.
"""
TABLE_HEAD = """
| key | value | default | description |
|---|---|---|---|
"""


def page() -> str:
    """Return the whole page."""
    return HEAD + "".join(map(_section, Group))


def _section(group: Group) -> str:
    properties: Mapping[str, Any] = Settings.model_json_schema()["properties"]
    rows = [_row(key, schema) for key, schema in properties.items() if group_of(key) is group]
    return f"\n## {group}\n{TABLE_HEAD}{''.join(rows)}"


def _row(key: str, schema: Mapping[str, Any]) -> str:
    default = f"`{default_of(key)}`" if default_of(key) else ""
    return f"| `{key}` | {_value(schema)} | {default} | {description_of(key)} |\n"


def _value(schema: Mapping[str, Any]) -> str:
    """Return the type and limits of a value in words."""
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


def main() -> None:
    """Write the page, or with `--check` exit with 1 if it is out of date."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/settings.md is out of date: run `make docs`")


if __name__ == "__main__":
    main()
