"""`llama2-server usage`: totals of the usage ledger."""

import asyncio
import csv
import io
import json
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import click

from llama2_server.cli.commands import CommandGroup
from llama2_server.cli.usage.maintenance import check, forward, ledger_directory, ledger_settings, retry, sources

if TYPE_CHECKING:
    from llama2_server.usage.records import DailyUsage

COLUMNS = ("account", "date", "model", "requests", "input_tokens", "output_tokens", "cached_tokens", "neurons")
MONTH_COLUMNS = ("account", "month", *COLUMNS[2:])
FIRST_NUMBER = 3
NUMBERS = frozenset(COLUMNS[FIRST_NUMBER:-1])
THIS_MONTH = "this month"


class _UsageGroup(CommandGroup):
    """Group that prints the totals if its arguments name no command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments of the group itself."""
        return super().parse_args(ctx, args) if args else click.Group.parse_args(self, ctx, args)


def _day(context: click.Context, option: click.Parameter, value: str | None) -> date | None:
    try:
        return None if value is None else date.fromisoformat(value)
    except ValueError:
        raise click.BadParameter("must be a day of the form YYYY-MM-DD", context, option) from None


def _month(context: click.Context, option: click.Parameter, value: str | None) -> date | None:
    if value == THIS_MONTH:
        return datetime.now(UTC).date().replace(day=1)
    try:
        return None if value is None else date.fromisoformat(f"{value}-01")
    except ValueError:
        raise click.BadParameter("must be a month of the form YYYY-MM", context, option) from None


@click.group(cls=_UsageGroup, invoke_without_command=True, subcommand_metavar="[COMMAND [ARGS]...]")
@click.option("--account", metavar="ID", help="Account; all accounts by default.")
@click.option("--since", callback=_day, metavar="YYYY-MM-DD", help="First day, in UTC.")
@click.option("--until", callback=_day, metavar="YYYY-MM-DD", help="Last day, in UTC.")
@click.option(
    "--month",
    callback=_month,
    is_flag=False,
    flag_value=THIS_MONTH,
    metavar="[YYYY-MM]",
    help="Totals of a month in UTC instead of days; of the current month without a value.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    help="Format of the output.  [default=table]",
)
@sources
@click.pass_context
def usage(
    context: click.Context,
    /,
    account: str | None,
    since: date | None,
    until: date | None,
    month: date | None,
    output_format: str,
    **flags: str | None,
) -> None:
    """Print usage totals by account, day and model, or by account, month and model, or maintain the usage ledger.

    The servers' settings file and LLAMA2_… environment variables select the ledger. Neurons are exact decimal numbers;
    in JSON they are text.
    """
    if context.invoked_subcommand is not None:
        return
    if month is not None and (since is not None or until is not None):
        raise click.UsageError("--month: cannot be combined with --since and --until; leave them out")
    if month is not None:
        since, until = month, (month + timedelta(days=31)).replace(day=1) - timedelta(days=1)
    # The database libraries are slow to import, and other commands do not need them.
    from llama2_server.usage import operations

    with ledger_settings(flags) as settings:
        if settings.usage_url is None:
            totals = operations.read_local_totals(ledger_directory(settings), account, since, until)
        else:
            url = settings.usage_url.get_secret_value()
            totals = asyncio.run(operations.read_store_totals(url, account, since, until))
    columns = COLUMNS if month is None else MONTH_COLUMNS
    rows = [_row(total) for total in totals] if month is None else _months(totals, f"{month:%Y-%m}")
    click.echo(_FORMATS[output_format](columns, rows), nl=False)


for command in (check, forward, retry):
    usage.add_command(command)


def _row(usage: "DailyUsage") -> tuple[str, ...]:
    return _fields(usage, str(usage.day), usage.neurons)


def _months(totals: Iterable["DailyUsage"], month: str) -> list[tuple[str, ...]]:
    """Return one row per account and model, with the sums of the month."""
    sums: dict[tuple[str, str], DailyUsage] = {}
    for day in totals:
        key = (day.account_id, day.model)
        sums[key] = sums[key] + day if key in sums else day
    return [_fields(total, month, total.neurons) for total in sums.values()]


def _fields(usage: "DailyUsage", time: str, neurons: Decimal) -> tuple[str, ...]:
    from llama2_server.usage.pricing import decimal_text

    cached = usage.cached_input_tokens + usage.cached_output_tokens
    counts = (usage.requests, usage.input_tokens, usage.output_tokens, cached)
    return (usage.account_id, time, usage.model, *map(str, counts), decimal_text(neurons))


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(
            value.rjust(width) if index >= FIRST_NUMBER else value.ljust(width)
            for index, (value, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _csv(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def _json(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    objects = [
        {name: int(value) if name in NUMBERS else value for name, value in zip(columns, row, strict=True)}
        for row in rows
    ]
    return json.dumps(objects, indent=2, ensure_ascii=False) + "\n"


_FORMATS = {"table": _table, "csv": _csv, "json": _json}
