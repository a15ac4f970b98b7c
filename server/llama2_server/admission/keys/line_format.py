"""Parse a keys file that has only the lines that `llama2-server keys` writes, much faster than YAML does."""

import re
from datetime import date

# A plain scalar that YAML could read as another type does not match.
_HEX = r"(?:'([0-9a-f]{%d})'|(?=[0-9]*[a-f]|0[0-9]*[89])(?!0b[01]+\b)([0-9a-f]{%d}))"
_TEXT = r"(?:'([^'\n]*)'|(?!(?i:true|false|yes|no|on|off|null|y|n)\b)([A-Za-z](?:[A-Za-z0-9 _.@/-]*[A-Za-z0-9_.@/-])?))"
_KEY = re.compile(
    rf"( +){_HEX % (12, 12)}: \{{account: {_TEXT}, name: {_TEXT}, enabled: (true|false), "
    rf"(?:expires: ([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}), )?salt: {_HEX % (32, 32)}, digest: {_HEX % (64, 64)}\}}"
)
_ACCOUNT = re.compile(
    rf"( +){_TEXT}: \{{(?:requests_per_minute: ([1-9][0-9]*))?(?:(?<=[0-9]), (?=n))?"
    r"(?:neurons_per_month: '([0-9]+(?:\.[0-9]+)?)')?\}"
)
_SECTIONS = ("keys", "accounts")


def parse_lines(text: str) -> dict[str, object] | None:
    """Return the document of a file of nothing but such lines; None for another file."""
    sections: dict[str, dict[str, object]] = {}
    indents: dict[str, set[str]] = {}
    section = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.endswith(":") and line[:-1] in _SECTIONS:
            section = line[:-1]
            if section in sections:
                return None
            sections[section], indents[section] = {}, set()
            continue
        parsed = _key(line) if section == "keys" else _account(line) if section == "accounts" else None
        if parsed is None:
            return None
        indent, name, fields = parsed
        indents[section].add(indent)
        sections[section][name] = fields
    complete = bool(sections.get("keys")) and all(len(found) == 1 for found in indents.values())
    return dict(sections) if complete else None


def _key(line: str) -> tuple[str, str, dict[str, object]] | None:
    match = _KEY.fullmatch(line)
    if match is None:
        return None
    indent, quoted_id, plain_id, *groups = match.groups()
    expires = groups.pop(5)
    # Each other value has a quoted form and a plain one.
    account, name, enabled, salt, digest = (text for text in groups if text is not None)
    fields: dict[str, object] = {"account": account, "name": name, "enabled": enabled == "true"}
    fields |= {"salt": salt, "digest": digest}
    if expires is not None:
        try:
            fields["expires"] = date.fromisoformat(expires)
        except ValueError:
            return None
    return indent, quoted_id or plain_id, fields


def _account(line: str) -> tuple[str, str, dict[str, object]] | None:
    match = _ACCOUNT.fullmatch(line)
    if match is None:
        return None
    indent, quoted, plain, requests, neurons = match.groups()
    fields: dict[str, object] = {}
    if requests is not None:
        fields["requests_per_minute"] = int(requests)
    if neurons is not None:
        fields["neurons_per_month"] = neurons
    return indent, plain if quoted is None else quoted, fields
