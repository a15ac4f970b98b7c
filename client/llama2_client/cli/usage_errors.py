"""Wrong command lines: one line each, with the name that the user typed and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource


class Command(click.Command):
    """Command whose errors have their context."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raise UsageError if an option or argument is missing, unknown or unexpected."""
        ctx.allow_extra_args = True  # click's own error does not explain how to pass a text of several words
        with _context_of_errors(ctx):
            rest = super().parse_args(ctx, args)
        if ctx.args:
            raise click.UsageError(_unexpected(ctx), ctx)
        return rest


class CommandGroup(click.Group):
    """Group that lists its commands in the order of their definition, and suggests the closest one."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options of the program. Raise UsageError if one is unknown or has no value.

        Without arguments, print the help and exit with 2; click's versions differ in this case.
        """
        if not args and not ctx.resilient_parsing:  # resilient: the shell asks for completions
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        with _context_of_errors(ctx):
            return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of their definition."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the name, the command and its arguments. Raise UsageError if the command does not exist."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            shown = name if len(name) <= 20 and name.isprintable() else "the first argument"
            hint = _suggestion(name, self.commands) or f"choose {', '.join(self.commands)}"
            raise click.UsageError(f"{shown}: no such command; {hint}", ctx)
        return super().resolve_command(ctx, args)


def print_error_line(line: str) -> None:
    """Print one error on standard error, after the program's name."""
    click.echo(f"{click.style('llama2:', fg='red', bold=True)} {line}", err=True)


def error_message(error: click.ClickException) -> str:
    """Return the error of a command line as `subject: what is wrong; how to fix it`."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return error.format_message()
    hint = f"see {context.command_path} --help"
    match error:
        case click.NoSuchOption(option_name=name):
            return f"{name}: no such option; {_remedy_of_option(context, name) or hint}"
        case click.BadOptionUsage(option_name=name):
            parameter = _options(context).get(name)
            takes_value = parameter is None or not parameter.is_flag
            return f"{name}: {'requires a value' if takes_value else 'does not take a value'}; {hint}"
        case click.MissingParameter(param=click.Parameter() as parameter):
            return f"{_name(context, parameter)}: missing; {hint}"
        case click.BadParameter(param=click.Parameter() as parameter):
            return f"{_name(context, parameter)}: {_wrong_value(parameter, error.message)}"
    return error.message


def _wrong_value(parameter: click.Parameter, message: str) -> str:
    """Return the rule for the value of a parameter; click's messages have no remedy and end with a full stop."""
    value = message.partition("'")[2].partition("'")[0]
    match parameter.type:
        case click.FloatRange(min=minimum, min_open=is_open) if minimum is not None and not value:
            return f"must be a number {'above' if is_open else 'of at least'} {minimum:g}"
        case click.types.FloatParamType():
            return f"must be a number, got {value}"
        case click.types.IntParamType():
            return f"must be a whole number, got {value}"
        case click.DateTime():
            return f"must be a day of the form YYYY-MM-DD, got {value}"
        case click.Choice(choices=choices):
            return f"must be {' or '.join(map(str, choices))}, got {value}"
        case click.Path() | click.File():
            return f"{message[0].lower()}{message[1:].rstrip('.')}; pass a file that you can read"
    return message


def _unexpected(context: click.Context) -> str:
    """Return the error for an argument too many."""
    arguments = [parameter for parameter in context.command.params if isinstance(parameter, click.Argument)]
    if any(argument.name == "text" for argument in arguments):
        return 'TEXT: must be one argument; put quotes around it, as in "Tell me a story"'
    return f"{context.args[0]}: unexpected argument; see {context.command_path} --help"


def _remedy_of_option(context: click.Context, name: str) -> str | None:
    """Return the remedy for an unknown option: another place, or the closest name."""
    root = context.find_root()
    if name in _options(root):
        return f"it comes before the command, as in `llama2 {name} … {context.info_name}`"
    if isinstance(root.command, click.Group) and context is root:
        for command in root.command.commands.values():
            if any(name in parameter.opts for parameter in command.params):
                return f"it comes after the command, as in `llama2 {command.name} {name} …`"
    return _suggestion(name, [*_options(context), *_options(root)])


def _suggestion(word: str, known: Iterable[str]) -> str | None:
    closest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {closest[0]}?" if closest else None


def _options(context: click.Context) -> dict[str, click.Option]:
    """Return the options of a command by their flags."""
    parameters = context.command.get_params(context)
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    return {flag: option for option in options for flag in option.opts if flag.startswith("--")}


def name_of(option: str) -> str:
    """Return the flag or the variable by which the user set an option of the program, given its Python name."""
    context = click.get_current_context(silent=True)
    if context is not None:
        root = context.find_root()
        for parameter in root.command.params:
            if parameter.name == option:
                return _name(root, parameter)
    return f"--{option.replace('_', '-')}"


def _name(context: click.Context, parameter: click.Parameter) -> str:
    """Return the name by which the user set the parameter: its flag, its variable or the name of the argument."""
    if not isinstance(parameter, click.Option):
        return parameter.human_readable_name
    if context.get_parameter_source(parameter.name or "") is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    return parameter.opts[0]


@contextmanager
def _context_of_errors(ctx: click.Context) -> Iterator[None]:
    """Add the context to usage errors; click's parser leaves it out of some."""
    try:
        yield
    except click.UsageError as error:
        error.ctx = error.ctx or ctx
        raise


def flag_of(field: str) -> str:
    """Return the flag or the argument of the running command for a field of a request, such as `top_p`.

    A field without a flag, such as `messages[1].content` in a chat, is returned unchanged.
    """
    context: Any = click.get_current_context(silent=True)
    name = field.partition("[")[0]
    parameters = [] if context is None else context.command.params
    for parameter in parameters:
        if parameter.name == ("text" if name == "prompt" else name):
            if isinstance(parameter, click.Argument):
                return parameter.human_readable_name
            rest = field.removeprefix(name)
            return f"{parameter.opts[0]}: {field}" if name == "messages" and rest else str(parameter.opts[0])
    return field
