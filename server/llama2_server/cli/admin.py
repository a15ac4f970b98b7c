"""What the operator does besides serving: `llama2-server keys …`, `usage` and `weights …`. It needs no torch."""

import asyncio
import os
import signal
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path

import click

from llama2_server.admission.accounts import new_key
from llama2_server.cli.exit import refuse
from llama2_server.config.sources import BadSettings, read_settings
from llama2_server.engine.checkpoint.hub import download_to
from llama2_server.engine.errors import WeightsError
from llama2_server.usage.errors import LedgerError
from llama2_server.usage.ledger import default_file, default_url, read_totals
from llama2_server.usage.pricing import decimal_text
from llama2_server.usage.records import DailyUsage

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

    The key goes to its owner; the line goes under `keys:` in the file that --api-keys-file names. The key cannot be had
    again from the line. To revoke it, delete the line; to disable it, set `enabled: false`.
    """
    key, line = new_key(account, name)
    click.echo(f"# The key, shown this once:\n{key}\n\n# The line for the keys file, under `keys:`\n  {line}")


@admin.command()
@click.option("--account", metavar="ID", help="One account; without it, all of them.")
@click.option("--since", type=DAY, metavar="YYYY-MM-DD", help="The first day, in UTC.")
@click.option("--until", type=DAY, metavar="YYYY-MM-DD", help="The last day, in UTC.")
@click.option("--config", metavar="FILE", help="The servers' settings file; their environment counts too.")
@click.option("--usage-url", metavar="URL", help="The ledger's store; else the servers' setting.")
@click.option("--data-directory", metavar="DIRECTORY", help="Where the ledger's file is; else the servers' setting.")
def usage(account: str | None, since: datetime | None, until: datetime | None, **settings: str | None) -> None:
    """Print the ledger's totals by account, day and model, as tab-separated values."""
    url = _ledger_url(settings)
    for line in _totals(url, account, *(day.date() if day else None for day in (since, until))):
        click.echo(line)


def _ledger_url(flags: Mapping[str, str | None]) -> str:
    """Where the ledger is, by the servers' own settings; `flags` win over them."""
    given = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items() if value is not None]
    try:
        settings = read_settings(given).settings
    except BadSettings as error:
        refuse(str(error))
    if settings.usage_url is not None:
        return settings.usage_url.get_secret_value()
    # To open one that is not there would make it, with an owner that may not be the server's.
    if not default_file(settings.data_directory).exists():
        refuse(f"data_directory: {settings.data_directory} holds no ledger; no server has kept usage there yet")
    return default_url(settings.data_directory)


@admin.group()
def weights() -> None:
    """Fetch checkpoints."""


@weights.command()
@click.argument("hub_id")
@click.option(
    "--to",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY",
    required=True,
    help="Where to; then --weights takes it.",
)
@click.option("--revision", metavar="REVISION", help="A commit, a tag or a branch; without it, the main branch.")
def fetch(hub_id: str, directory: Path, revision: str | None) -> None:
    """Fetch HUB_ID, such as meta-llama/Llama-2-7b-chat-hf, from the Hugging Face Hub into DIRECTORY, once.

    DIRECTORY is there when all of it has come, never before; a fetch that was cut off goes on where it was. HF_TOKEN in
    the environment opens gated models.
    """
    # The first process of a container is deaf to a signal without a handler; what has come so far is kept.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    try:
        fetched = download_to(directory, hub_id, revision)
    except WeightsError as error:
        refuse(str(error))
    click.echo(f"{directory}: {'fetched' if fetched else 'there already'}")


def _totals(url: str, account: str | None, since: date | None, until: date | None) -> list[str]:
    try:
        totals = asyncio.run(read_totals(url, account, since, until))
    except LedgerError as error:
        refuse(str(error))
    header = "account\tdate\tmodel\trequests\tinput_tokens\toutput_tokens\tcached_tokens\tneurons"
    return [header, *map(_line, totals)]


def _line(usage: DailyUsage) -> str:
    cached = usage.cached_input_tokens + usage.cached_output_tokens
    counts = (usage.requests, usage.input_tokens, usage.output_tokens, cached)
    return "\t".join(map(str, (usage.account_id, usage.day, usage.model, *counts, decimal_text(usage.neurons))))
