"""Where settings come from: a YAML file, `LLAMA2_…` in the environment, flags, in that order of growing strength."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError
from pydantic_settings import CliSettingsSource, EnvSettingsSource, SettingsError

from llama2_server.config.settings import ENV_PREFIX, Settings
from llama2_server.configuration_error import ConfigurationError

# The client's, which may stand in the same environment.
CLIENT_VARIABLES = frozenset({"LLAMA2_ADDRESS", "LLAMA2_API_KEY", "LLAMA2_TIMEOUT"})
# What Kubernetes puts into the environment of every pod beside a Service that is called llama2 or llama2-something.
_SERVICE_LINK = re.compile(r"LLAMA2_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


class BadSettings(ConfigurationError):
    """The settings are refused; the message has one line for each problem, with the key and what is allowed."""


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Settings, and for each key that was set where its value comes from."""

    settings: Settings
    sources: Mapping[str, str]

    def __str__(self) -> str:
        """All values in force as YAML, each with its source; secrets masked."""
        lines = [(_line(key, getattr(self.settings, key)), self._source(key)) for key in Settings.model_fields]
        width = max(len(line) for line, _ in lines if len(line) <= 60)
        return "\n".join(f"{line:{width}}  # {source}" for line, source in lines)

    def _source(self, key: str) -> str:
        return self.sources.get(key, "default")


def read_settings(arguments: Sequence[str]) -> ResolvedSettings:
    """The settings in force, given the command line's arguments; `--help` prints and exits.

    Raises:
        BadSettings: a key that does not exist, a wrong type or value, an impossible pair, a file that cannot be read.
    """
    flags = _flags(arguments)
    environment = EnvSettingsSource(Settings)()
    file = flags.get("config") or environment.get("config")
    in_file = {} if file is None else _read_file(Path(file))
    sources = dict.fromkeys(in_file, str(file))
    sources |= {key: f"{ENV_PREFIX}{key.upper()}" for key in environment}
    sources |= {key: _flag(key) for key in flags}
    problems = [*_unknown_variables(os.environ), *_unknown_keys(in_file, str(file))]
    values = {key: value for key, value in {**in_file, **environment, **flags}.items() if key in Settings.model_fields}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise BadSettings("\n".join([*problems, *_invalid(error, sources)])) from None
    if problems:
        raise BadSettings("\n".join(problems))
    return ResolvedSettings(settings, sources)


def _flags(arguments: Sequence[str]) -> Mapping[str, Any]:
    try:
        return CliSettingsSource[Any](Settings, cli_parse_args=list(arguments))()
    except SettingsError as error:
        problem = str(error).removeprefix("error parsing CLI: ")
        # Only the flag's name is repeated: what stands behind it may be a secret.
        if unknown := re.match(r"unrecognized arguments: ([\w-]+)", problem):
            problem = f"{unknown[1]}: there is no such flag{_guess(unknown[1], map(_flag, Settings.model_fields))}"
        raise BadSettings(f"{problem}; llama2-server --help lists the flags") from None


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeysLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettings(f"config: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        # The error quotes the line, which may hold a secret: only its place is told.
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise BadSettings(f"config: {path}{place}: {getattr(error, 'problem', 'not YAML')}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise BadSettings(f"config: {path} must be a mapping of settings to values, such as `listen: 127.0.0.1:50051`")
    return {str(key): value for key, value in document.items()}


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unknown_variables(environment: Iterable[str]) -> Iterator[str]:
    known = {f"{ENV_PREFIX}{key.upper()}" for key in Settings.model_fields} | CLIENT_VARIABLES
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name):
            yield f"{name}: there is no such setting{_guess(name, known)}"


def _unknown_keys(in_file: Iterable[str], file: str) -> Iterator[str]:
    for key in in_file:
        if key not in Settings.model_fields:
            yield f"{key} (in {file}): there is no such setting{_guess(key, Settings.model_fields)}"
        elif key == "config":
            yield f"config (in {file}): a settings file cannot name another"


def _invalid(error: ValidationError, sources: Mapping[str, str]) -> Iterator[str]:
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        key = str(problem["loc"][0]) if problem["loc"] else ""
        yield f"{key} ({sources.get(key, 'default')}): {message}" if key else message


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), {key.lower() for key in known}, n=1)
    return f"; did you mean {close[0].upper() if name.isupper() else close[0]}?" if close else ""


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _line(key: str, value: object) -> str:
    plain = str(value) if isinstance(value, (Path, SecretStr)) else value
    return yaml.safe_dump({key: plain}, allow_unicode=True, width=1000).strip()
