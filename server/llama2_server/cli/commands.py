"""Commands and groups of `llama2-server` with one-line error messages that never repeat a value."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from llama2_server.config.sources import suggest

HELP_FLAGS = ("-h", "--help")
# A word that looks like this may be repeated in an error message; a longer text may be a secret.
_COMMAND_NAME = re.compile(r"[A-Za-z][A-Za-z-]{0,19}")


class Command(click.Command):
    """Command that rejects additional arguments without repeating them, because they may be secrets."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            UsageError: an option or argument is missing, unknown or unexpected.
        """
        ctx.allow_extra_args = True  # click's own error would print the arguments
        with _context_of_errors(ctx):
            rest = super().parse_args(ctx, args)
        if ctx.args:
            raise click.UsageError(_unexpected(ctx, ctx.args[0]), ctx)
        return rest


class CommandGroup(click.Group):
    """Group that lists its commands in the order of their definition and suggests the closest one."""

    command_class = Command

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"no_args_is_help": False, "subcommand_metavar": "COMMAND [ARGS]...", **options})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments of the group itself.

        Raises:
            UsageError: the command is missing.
        """
        if not args:
            raise click.UsageError(f"{ctx.info_name}: missing command; choose {' or '.join(self.commands)}", ctx)
        with _context_of_errors(ctx):
            return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of their definition."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the name, the command and its arguments.

        Raises:
            UsageError: the command does not exist.
        """
        if args[0] not in self.commands and not args[0].startswith("-"):
            subject = f"{args[0]}: " if _COMMAND_NAME.fullmatch(args[0]) else ""
            raise click.UsageError(f"{subject}no such command{self._suggest(ctx, args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def _suggest(self, ctx: click.Context, word: str) -> str:
        return suggest(word, [*self.commands, *_flags(ctx)]) or _help_hint(ctx)


@contextmanager
def _context_of_errors(ctx: click.Context) -> Iterator[None]:
    """Add the context to usage errors; click's parser leaves it out of some."""
    try:
        yield
    except click.UsageError as error:
        error.ctx = error.ctx or ctx
        raise


def error_message(error: click.ClickException) -> str:
    """Return the error as `subject: what is wrong; how to fix it`, without the value that caused it."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return error.message
    hint = _help_hint(context)
    match error:
        case click.NoSuchOption(option_name=name):
            return f"{name}: no such option{suggest(name, _flags(context)) or hint}"
        case click.BadOptionUsage(option_name=name):
            return f"{name}: {'does not take a value' if _is_switch(context, name) else 'requires a value'}{hint}"
        case click.MissingParameter(param=click.Parameter() as parameter):
            return f"{_name(parameter)}: missing{hint}"
        case click.BadParameter(param=click.Parameter() as parameter):
            return f"{_name(parameter)}: {error.message}"
    return error.message


def _unexpected(ctx: click.Context, word: str) -> str:
    root = ctx.find_root().command
    if isinstance(root, click.Group) and word in root.commands:
        return f"{word}: a command must be the first argument, as in `llama2-server {word} …`"
    return f"unexpected argument{_help_hint(ctx)}"


def _flags(context: click.Context) -> Iterator[str]:
    """Yield the flags of the command and of the groups above it."""
    current: click.Context | None = context
    while current is not None:
        for parameter in current.command.get_params(current):
            if isinstance(parameter, click.Option):
                yield from (flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("--"))
        current = current.parent


def _is_switch(context: click.Context, flag: str) -> bool:
    parameters = context.command.get_params(context)
    return any(
        isinstance(parameter, click.Option)
        and parameter.is_flag
        and flag in (*parameter.opts, *parameter.secondary_opts)
        for parameter in parameters
    )


def _name(parameter: click.Parameter) -> str:
    return parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name


def _help_hint(context: click.Context) -> str:
    return f"; see {context.command_path} --help"
