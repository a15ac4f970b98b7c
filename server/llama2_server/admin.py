"""What the operator does besides serving: `llama2-server keys …` and `llama2-server usage`."""

import asyncio
from datetime import date, datetime
from pathlib import Path
from typing import NoReturn

import click

from llama2_server.accounts import new_key
from llama2_server.ledger.failures import LedgerError
from llama2_server.ledger.ledger import default_url, read_totals
from llama2_server.ledger.records import DailyUsage
from llama2_server.metering import decimal_text
from llama2_server.settings import default_data_directory

DAY = click.DateTime(["%Y-%m-%d"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def admin() -> None:
    """What the operator of a server does besides serving."""


@admin.group()
def keys() -> None:
    """Make API keys for the keys file."""


@keys.command()
@click.argument("account")
@click.option("--name", default="", help="Whose account it is, for people who read the file.")
def new(account: str, name: str) -> None:
    """Print a new key for ACCOUNT, once, and the line that makes it valid.

    The key goes to its owner; the line goes under `keys:` in the file that --keys-file names. The key cannot be had
    again from the line. To revoke it, delete the line; to disable it, set `enabled: false`.
    """
    key, line = new_key(account, name)
    click.echo(f"# The key, shown this once:\n{key}\n\n# The line for the keys file, under `keys:`\n  {line}")


@admin.command()
@click.option("--account", metavar="ID", help="One account; without it, all of them.")
@click.option("--since", type=DAY, metavar="YYYY-MM-DD", help="The first day, in UTC.")
@click.option("--until", type=DAY, metavar="YYYY-MM-DD", help="The last day, in UTC.")
@click.option(
    "--ledger-url",
    envvar="LLAMA2_LEDGER_URL",
    help="The ledger's store, as the servers have it; else the file in the data directory.  [env: LLAMA2_LEDGER_URL]",
)
@click.option(
    "--data-directory",
    envvar="LLAMA2_DATA_DIRECTORY",
    default=default_data_directory,
    type=click.Path(),
    help="The servers' data directory.  [env: LLAMA2_DATA_DIRECTORY]",
)
def usage(
    account: str | None, since: datetime | None, until: datetime | None, ledger_url: str | None, data_directory: str
) -> None:
    """Print the ledger's totals by account, day and model, as tab-separated values."""
    url = ledger_url or default_url(Path(data_directory))
    for line in _totals(url, account, *(day.date() if day else None for day in (since, until))):
        click.echo(line)


def _totals(url: str, account: str | None, since: date | None, until: date | None) -> list[str]:
    try:
        totals = asyncio.run(read_totals(url, account, since, until))
    except LedgerError as error:
        _refuse(str(error))
    header = "account\tdate\tmodel\trequests\tinput_tokens\toutput_tokens\tcached_tokens\tneurons"
    return [header, *map(_line, totals)]


def _line(usage: DailyUsage) -> str:
    cached = usage.cached_input_tokens + usage.cached_output_tokens
    counts = (usage.requests, usage.input_tokens, usage.output_tokens, cached)
    return "\t".join(map(str, (usage.account, usage.day, usage.model, *counts, decimal_text(usage.neurons))))


def _refuse(problem: str) -> NoReturn:
    click.echo(f"llama2-server: {problem}", err=True)
    raise SystemExit(2)
