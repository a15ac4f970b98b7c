"""The `llama2-server` program and its default command, `serve`."""

import sys
from typing import Any, NoReturn

import click

from llama2_server.cli.commands import HELP_FLAGS, CommandGroup, error_message
from llama2_server.cli.exit import EXIT_INTERRUPTED, exit_with_error
from llama2_server.cli.keys import keys
from llama2_server.cli.options import write_settings
from llama2_server.cli.receipts import receipts
from llama2_server.cli.serve import serve
from llama2_server.cli.settings import settings
from llama2_server.cli.usage.report import usage
from llama2_server.cli.weights import weights
from llama2_server.configuration_error import ConfigurationError

PROGRAM = "llama2-server"


class _Program(CommandGroup):
    """Group that runs `serve` if its first argument is an option, or if it has none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, after adding the default command if necessary."""
        own_flags = {flag for option in self.get_params(ctx) for flag in option.opts}
        if not args or (args[0].startswith("-") and args[0] not in own_flags):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, the program's options and the options of the default command."""
        self.format_commands(ctx, formatter)
        with formatter.section("Options"):
            formatter.write_dl([row for option in self.get_params(ctx) if (row := option.get_help_record(ctx))])
        write_settings(formatter, serve)

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run a command and exit; each error is one line on stderr with the exit code 2."""
        try:
            super().main(*args, **{**options, "standalone_mode": False, "prog_name": PROGRAM})
        except click.ClickException as error:
            exit_with_error(error_message(error))
        except ConfigurationError as error:
            exit_with_error(str(error))
        except click.Abort:
            sys.exit(EXIT_INTERRUPTED)
        sys.exit(0)


@click.group(
    cls=_Program,
    context_settings={"help_option_names": HELP_FLAGS, "max_content_width": 120},
    options_metavar="",
    subcommand_metavar="[serve] [OPTIONS] | COMMAND [ARGS]...",
)
@click.version_option(package_name="llama2-grpc", message="%(prog)s %(version)s")
def program() -> None:
    """Serve one Llama-2 model over gRPC.

    The grouped options below are the options of `serve`, the default command. Each is also an environment variable and
    a key of the settings file: --listen is LLAMA2_LISTEN and listen. Flags override variables, which override the file.
    """


for command in (serve, settings, keys, receipts, usage, weights):
    program.add_command(command)


def main() -> None:
    """Run the command line of this process."""
    program.main()
