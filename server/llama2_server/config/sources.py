"""Sources of the settings: a YAML file, `LLAMA2_…` environment variables and flags; each overrides the ones before."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource

from llama2_server.config.settings import ENV_PREFIX, Settings
from llama2_server.configuration_error import ConfigurationError

# Variables of the client, which may be in the same environment.
CLIENT_VARIABLES = frozenset({"LLAMA2_ADDRESS", "LLAMA2_API_KEY", "LLAMA2_QUOTA_WAIT", "LLAMA2_TIMEOUT"})
# Kubernetes adds these variables to every pod if a Service has the name llama2 or llama2-something.
_SERVICE_LINK = re.compile(r"LLAMA2_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
# Our words for pydantic's error types. They never repeat the value, which may be a secret.
_MESSAGES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "literal_error": "must be {expected}",
    "path_type": "must be a path",
    "string_type": "must be text",
    "value_error": "{error}",
}


class SettingsError(ConfigurationError):
    """The settings are not valid; the message has one line per problem, with the name of the setting."""


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Settings, and the source of each setting that is not a default."""

    settings: Settings
    sources: Mapping[str, str]

    def __str__(self) -> str:
        """Return all values in force as YAML, each with its source, secrets masked."""
        entries = [
            (_yaml_entry(key, getattr(self.settings, key)), self.sources.get(key, "default"))
            for key in Settings.model_fields
        ]
        width = max(len(entry) for entry, _ in entries if len(entry) <= 60)
        return "\n".join(f"{entry:{width}}  # {source}" for entry, source in entries)

    def name_sources(self, message: str) -> str:
        """Replace each flag in a message by the environment variable or the key that set its value."""
        return _name_sources(message, self.sources)

    @contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Raise a ConfigurationError from the body with the sources of its settings; see `name_sources`."""
        try:
            yield
        except ConfigurationError as error:
            raise ConfigurationError(self.name_sources(str(error))) from error


def flag_of(key: str) -> str:
    """Return the flag of a setting."""
    return f"--{key.replace('_', '-')}"


def suggest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return "; did you mean …?" with the closest known name, or an empty string if none is close.

    Args:
        name: the unknown name.
        known: the known names.
        prefix: the start of all names, which is left out of the comparison.
    """
    by_spelling = {key.removeprefix(prefix).lower(): key for key in known}
    close = difflib.get_close_matches(name.removeprefix(prefix).lower(), by_spelling, n=1)
    return f"; did you mean {by_spelling[close[0]]}?" if close else ""


def read_settings(flags: Mapping[str, Any]) -> ResolvedSettings:
    """Return the settings in force, given the values of flags by the names of the settings; None is not given.

    Raises:
        SettingsError: an unknown key, a wrong type or value, values that exclude each other, or an unreadable file.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    environment = EnvSettingsSource(Settings)()
    sources = {key: _variable(key) for key in environment} | {key: flag_of(key) for key in given}
    file = given.get("config") or environment.get("config")
    in_file = {} if file is None else _read_file(Path(file), sources["config"])
    sources = dict.fromkeys(in_file, str(file)) | sources
    errors = [*_unknown_variables(os.environ), *_unknown_keys(in_file, str(file))]
    values = {key: value for key, value in {**in_file, **environment, **given}.items() if key in Settings.model_fields}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join([*errors, *_format_errors(error, sources)])) from None
    if errors:
        raise SettingsError("\n".join(errors))
    return ResolvedSettings(settings, sources)


def _read_file(path: Path, name: str) -> Mapping[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeysLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        # The error quotes its input, which may contain a secret, so the message has only a line number.
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{name}: {path}{place}: {getattr(error, 'problem', 'not YAML')}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"{name}: {path} must map settings to values, such as `listen: 127.0.0.1:50051`")
    return {str(key): value for key, value in document.items()}


class _UniqueKeysLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; YAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unknown_variables(environment: Iterable[str]) -> Iterator[str]:
    known = {_variable(key) for key in Settings.model_fields} | CLIENT_VARIABLES
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name):
            # Without the prefix, because any two names with the same prefix look similar.
            yield f"{name}: no such setting{suggest(name, known, prefix=ENV_PREFIX)}"


def _unknown_keys(in_file: Iterable[str], file: str) -> Iterator[str]:
    for key in in_file:
        if key not in Settings.model_fields:
            yield f"{key} in {file}: no such setting{suggest(key, Settings.model_fields)}"
        elif key == "config":
            yield f"config in {file}: a settings file cannot name another one"


def _format_errors(error: ValidationError, sources: Mapping[str, str]) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_input=False):
        message = problem["msg"]
        if template := _MESSAGES.get(problem["type"]):
            message = template.format(**problem.get("ctx", {}))
        if problem["loc"]:
            message = f"{flag_of(str(problem['loc'][0]))}: {message}"
        yield _name_sources(message, sources)


def _name_sources(message: str, sources: Mapping[str, str]) -> str:
    def name_of(flag: re.Match[str]) -> str:
        key = flag[0].removeprefix("--").replace("-", "_")
        source = sources.get(key, flag[0])
        return source if source in (flag[0], _variable(key)) else f"{key} in {source}"

    return _FLAG.sub(name_of, message)


def _variable(key: str) -> str:
    return f"{ENV_PREFIX}{key.upper()}"


def _yaml_entry(key: str, value: object) -> str:
    plain = str(value) if isinstance(value, (Path, SecretStr)) else value
    return yaml.safe_dump({key: plain}, allow_unicode=True, width=1000).strip()
