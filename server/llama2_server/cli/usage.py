"""`llama2-server usage`: totals of the usage ledger."""

import asyncio
from datetime import date
from typing import TYPE_CHECKING

import click

from llama2_server.cli.commands import Command
from llama2_server.config.settings import Settings
from llama2_server.config.sources import read_settings
from llama2_server.configuration_error import ConfigurationError

if TYPE_CHECKING:
    from llama2_server.usage.records import DailyUsage

HEADER = "account\tdate\tmodel\trequests\tinput_tokens\toutput_tokens\tcached_tokens\tneurons"


def _day(context: click.Context, option: click.Parameter, value: str | None) -> date | None:
    try:
        return None if value is None else date.fromisoformat(value)
    except ValueError:
        raise click.BadParameter("must be a day of the form YYYY-MM-DD", context, option) from None


@click.command(cls=Command)
@click.option("--account", metavar="ID", help="Account; all accounts by default.")
@click.option("--since", callback=_day, metavar="YYYY-MM-DD", help="First day, in UTC.")
@click.option("--until", callback=_day, metavar="YYYY-MM-DD", help="Last day, in UTC.")
@click.option("--config", metavar="FILE", help="Settings file of the servers.")
@click.option("--usage-url", metavar="URL", help="Usage database; by default, the servers' setting.")
@click.option("--data-directory", metavar="DIRECTORY", help="Data directory; by default, the servers' setting.")
def usage(account: str | None, since: date | None, until: date | None, **flags: str | None) -> None:
    """Print usage totals by account, day and model.

    The output is tab-separated values. The servers' settings file and LLAMA2_… environment variables select the ledger.
    """
    # The database libraries are slow to import, and other commands do not need them.
    from llama2_server.usage.ledger import read_totals

    resolved = read_settings(flags)
    with resolved.naming_sources():
        totals = asyncio.run(read_totals(_usage_url(resolved.settings), account, since, until))
    click.echo("\n".join([HEADER, *map(_row, totals)]))


def _usage_url(settings: Settings) -> str:
    """Return the URL of the servers' ledger."""
    from llama2_server.usage.ledger import default_file, default_url

    if settings.usage_url is not None:
        return settings.usage_url.get_secret_value()
    # Opening a missing ledger would create it, possibly with an owner that is not the server's.
    if not default_file(settings.data_directory).exists():
        raise ConfigurationError(
            f"--data-directory: {settings.data_directory} has no usage ledger; no server has written one there yet"
        )
    return default_url(settings.data_directory)


def _row(usage: "DailyUsage") -> str:
    from llama2_server.usage.pricing import decimal_text

    cached = usage.cached_input_tokens + usage.cached_output_tokens
    counts = (usage.requests, usage.input_tokens, usage.output_tokens, cached)
    return "\t".join(map(str, (usage.account_id, usage.day, usage.model, *counts, decimal_text(usage.neurons))))
