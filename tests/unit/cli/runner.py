"""Run `llama2-server` commands in the process of the tests."""

import os
from collections.abc import Mapping, Sequence

from click.testing import CliRunner, Result

from llama2_server.cli.main import program


def invoke(arguments: Sequence[str], variables: Mapping[str, str], *, columns: int = 80) -> Result:
    """Run a command with these environment variables, without other settings from the developer's environment."""
    environment = {name: None for name in os.environ if name.startswith("LLAMA2_")} | dict(variables)
    # click's runner ignores the terminal's width. These are the limits of click outside the tests.
    width = min(columns, program.context_settings["max_content_width"]) - 2
    return CliRunner().invoke(program, arguments, env=environment, terminal_width=width)


def output(*arguments: str, columns: int = 80, **variables: str) -> str:
    """Return the standard output of a command that succeeds."""
    result = invoke(arguments, variables, columns=columns)
    assert result.exit_code == 0, result.output
    return result.stdout


def error(*arguments: str, **variables: str) -> str:
    """Return the only error line of a command that fails with exit code 2, without the program's name."""
    result = invoke(arguments, variables)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1, result.stderr
    line = result.stderr.removesuffix("\n")
    assert line.startswith("llama2-server: ")
    return line.removeprefix("llama2-server: ")
