"""`llama2-server usage check`, `forward` and `retry`: maintenance of the usage ledger."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from llama2_server.cli.commands import Command
from llama2_server.cli.exit import exit_with_error
from llama2_server.config.settings import Settings
from llama2_server.config.sources import read_settings
from llama2_server.configuration_error import ConfigurationError


def sources(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that select the ledger."""
    for option in (
        click.option("--data-directory", metavar="DIRECTORY", help="Data directory; by default, the servers' setting."),
        click.option("--usage-url", metavar="URL", help="Usage database; by default, the servers' setting."),
        click.option("--config", metavar="FILE", help="Settings file of the servers."),
    ):
        command = option(command)
    return command


@click.command(cls=Command)
@sources
@click.option("--repair", is_flag=True, help="Replace wrong totals by the totals of the records.")
def check(*, repair: bool, **flags: str | None) -> None:
    """Compare the daily totals with the records, in the usage database and the data directory.

    Exit with 2 if they differ.
    """
    from llama2_server.usage import operations

    with ledger_settings(flags) as settings:
        differences: list[str] = []
        if settings.usage_url is not None:
            url = settings.usage_url.get_secret_value()
            differences += asyncio.run(operations.check_store_totals(url, repair=repair))
        if settings.usage_url is None or _has_ledger(settings):
            differences += operations.check_local_totals(ledger_directory(settings), repair=repair)
    if differences and not repair:
        exit_with_error("\n".join([*differences, "usage check: totals differ from the records; run it with --repair"]))
    click.echo("\n".join([*differences, "repaired" if differences else "the daily totals equal the records"]))


@click.command(cls=Command)
@sources
def forward(**flags: str | None) -> None:
    """Forward all records of a data directory to the usage database.

    Use it for the data directory of a server that does not start again. Exit with 2 if records remain there.
    """
    from llama2_server.usage import operations

    with ledger_settings(flags) as settings:
        if settings.usage_url is None:
            raise ConfigurationError("--usage-url: missing; pass the database that receives the records")
        url = settings.usage_url.get_secret_value()
        forwarded, rejected = asyncio.run(operations.forward_records(ledger_directory(settings), url))
    click.echo(f"forwarded {forwarded} records")
    if rejected:
        exit_with_error(
            f"usage forward: the database rejected {rejected} records; see `llama2-server usage retry --help`"
        )


@click.command(cls=Command)
@sources
def retry(**flags: str | None) -> None:
    """Send the records again that the usage database rejected.

    A running server sends them within a second. Without a server, run `llama2-server usage forward`.
    """
    from llama2_server.usage import operations

    with ledger_settings(flags) as settings:
        count = operations.retry_rejected(ledger_directory(settings))
    click.echo(f"{count} records will be sent again")


@contextmanager
def ledger_settings(flags: dict[str, str | None]) -> Iterator[Settings]:
    """Yield the settings; errors name their source."""
    resolved = read_settings(flags)
    with resolved.naming_sources():
        yield resolved.settings


def _has_ledger(settings: Settings) -> bool:
    from llama2_server.usage.local.local_ledger import file_of

    return file_of(settings.data_directory).exists()


def ledger_directory(settings: Settings) -> Path:
    """Return the data directory of the servers' ledger."""
    # Opening a missing ledger would create it, possibly with an owner that is not the server's.
    if not _has_ledger(settings):
        raise ConfigurationError(
            f"--data-directory: {settings.data_directory} has no usage ledger; no server has written one there yet"
        )
    return settings.data_directory
