"""Command-line options made from the settings, in groups."""

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from llama2_server.cli.commands import Command
from llama2_server.config.settings import Group, Settings, default_of, description_of, group_of
from llama2_server.config.sources import flag_of

# Lines at least this wide have room for a flag and its description next to each other.
_WIDE = 108
_WIDEST_FLAG = 42
# The name of a value by the end of its setting's name.
_METAVARS: Mapping[str, str] = {
    "_seconds": "SECONDS",
    "_bytes": "BYTES",
    "_url": "URL",
    "_endpoint": "URL",
    "_directory": "DIRECTORY",
    "_public_keys": "DIRECTORY",
    "listen": "HOST:PORT",
    "card": "CARD",
    "weights": "CHECKPOINT",
}


class SettingOption(click.Option):
    """Option for one setting; its value stays text, because `Settings` checks the values of all sources."""

    def __init__(self, key: str, field: FieldInfo) -> None:
        flag = flag_of(key)
        is_switch = field.annotation is bool
        super().__init__(
            [f"{flag}/--no-{flag.removeprefix('--')}" if is_switch else flag],
            callback=None if is_switch else _reject_flag,
            default=None,
            metavar=None if is_switch else _metavar(key, field.annotation),
            help=description_of(key).split(". ")[0].removesuffix(".") + ".",
        )
        self.key = key
        self.shown_default = f"  [default={default}]" if (default := default_of(key)) else ""

    def help_row(self, *, wide: bool) -> tuple[str, str]:
        """Return the flag and its description; the default value is in the column with more room."""
        flag, text = " / ".join([*self.opts, *self.secondary_opts]), self.help or ""
        if not self.secondary_opts:
            flag = f"{flag} {self.metavar}"
        if wide and len(flag) <= _WIDEST_FLAG:
            return flag, f"{text}{self.shown_default}"
        return f"{flag}{self.shown_default}", text


class SettingsCommand(Command):
    """Command that takes every setting as an option."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params = [*(SettingOption(key, field) for key, field in Settings.model_fields.items()), *self.params]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their groups."""
        write_settings(formatter, self)
        others = [option for option in self.get_params(ctx) if not isinstance(option, SettingOption)]
        with formatter.section("Other options"):
            formatter.write_dl([row for option in others if (row := option.get_help_record(ctx))])


def write_settings(formatter: click.HelpFormatter, command: click.Command) -> None:
    """Write the settings of a command under the headings of their groups, in at most two lines each."""
    wide = formatter.width >= _WIDE
    options = [option for option in command.params if isinstance(option, SettingOption)]
    for group in Group:
        with formatter.section(group):
            rows = [option.help_row(wide=wide) for option in options if group_of(option.key) is group]
            formatter.write_dl(rows, col_max=_WIDEST_FLAG if wide else 4)


def _reject_flag(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Return the value of an option; click would take the next flag as the value."""
    if value in [flag_of(key) for key in Settings.model_fields]:
        raise click.BadOptionUsage(option.opts[0], "requires a value", context)
    return value


def _metavar(key: str, annotation: Any) -> str:
    kind = _plain_type(annotation)
    if get_origin(kind) is Literal:
        return f"[{'|'.join(get_args(kind))}]"
    for ending, metavar in _METAVARS.items():
        if key.endswith(ending):
            return metavar
    return {int: "NUMBER", Path: "FILE", SecretStr: "SECRET"}.get(kind, "TEXT")


def _plain_type(annotation: Any) -> Any:
    """Return the type of a setting without None and without constraints."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
