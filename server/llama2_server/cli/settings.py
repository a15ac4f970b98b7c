"""`llama2-server settings`: the settings in force."""

from typing import Any

import click

from llama2_server.cli.options import SettingsCommand
from llama2_server.config.sources import read_settings


@click.command(cls=SettingsCommand)
def settings(**flags: Any) -> None:
    """Print the settings in force and their sources, secrets masked.

    Pass the same options, environment and settings file as to the server.
    """
    click.echo(str(read_settings(flags)))
