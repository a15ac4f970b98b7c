"""`llama2-server keys`: edit the API keys of the API keys file, and the limits of their accounts."""

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama2_server.cli.commands import CommandGroup
from llama2_server.cli.exit import exit_with_error

if TYPE_CHECKING:
    from llama2_server.admission.keys.account_limits import AccountLimits
    from llama2_server.admission.keys.keys_file import KeyRecord

KEEP_DAYS = 7


@click.group(cls=CommandGroup)
def keys() -> None:
    """Edit the API keys file."""


def _file_option(*, required: bool) -> Callable[[Any], Any]:
    help_text = "API keys file of the servers; LLAMA2_API_KEYS_FILE by default."
    return click.option(
        "--api-keys-file",
        "file",
        type=click.Path(path_type=Path),
        envvar="LLAMA2_API_KEYS_FILE",
        metavar="FILE",
        required=required,
        help=help_text,
    )


def _day(context: click.Context, option: click.Parameter, value: str | None) -> date | None:
    try:
        day = None if value is None else date.fromisoformat(value)
    except ValueError:
        raise click.BadParameter("must be a day of the form YYYY-MM-DD", context, option) from None
    if day is not None and day < _today():
        raise click.BadParameter(f"must not be in the past; today is {_today()} in UTC", context, option)
    return day


expires_option = click.option(
    "--expires", callback=_day, metavar="YYYY-MM-DD", help="Last day of the key, in UTC; no end by default."
)


@keys.command()
@click.argument("account")
@click.option("--name", default="", metavar="TEXT", help="Name of the account's owner; a note in the file.")
@expires_option
@_file_option(required=False)
def new(account: str, name: str, expires: date | None, file: Path | None) -> None:
    """Create an API key for ACCOUNT, print it, and add its entry to the API keys file.

    Send the key to its owner. The entry does not contain the key, so the key cannot be recovered. Without a file, the
    entry is printed; add it to the servers' file, under `keys:`. A file that is missing is created.
    """
    from llama2_server.admission.keys import keys_editor  # imports YAML, which other commands do not need
    from llama2_server.admission.keys.keys_file import new_key, parse

    key, entry = new_key(account, name, expires)
    if file is not None:  # first: a key that is printed is in the file
        keys_editor.edit(file, parse(file, f"keys:\n  {entry}\n").keys)
    if file is None:
        click.echo(f"# API key, shown only once:\n{key}\n\n# Entry for the API keys file, under `keys:`\n  {entry}")
    else:
        _print_key(key, f"added to {file} as {_id_of(key)}")


def _print_key(key: str, note: str) -> None:
    """Print the key alone to standard output, so that a script can read it, and the note to standard error."""
    click.echo(key)
    click.echo(f"The key is shown only once; {note}", err=True)


@keys.command(name="list")
@_file_option(required=True)
def list_keys(file: Path) -> None:
    """Print the keys of the file: id, account, state, last day and name. The keys themselves are not stored."""
    from llama2_server.admission.keys import keys_editor

    rows = [("key", "account", "state", "expires", "name")]
    content = keys_editor.read_file(file)
    for key_id, record in content.keys.items():
        expires = "" if record.expires is None else str(record.expires)
        rows.append((key_id, record.account, keys_editor.state_of(record, _today()), expires, record.name))
    _print_table(rows)
    if content.accounts:
        limits = [(account, *_texts(one)) for account, one in content.accounts.items()]
        click.echo()
        _print_table([("account", "requests per minute", "neurons per month"), *limits])


@keys.command()
@click.argument("account")
@click.option(
    "--requests-per-minute", metavar="NUMBER|card", help="Requests in any 60 seconds; `card`: as in the card."
)
@click.option("--neurons-per-month", metavar="NUMBER|none", help="Budget per month in UTC; `none`: without a budget.")
@_file_option(required=True)
def limit(account: str, requests_per_minute: str | None, neurons_per_month: str | None, file: Path) -> None:
    """Set the quota and the monthly neuron budget of ACCOUNT in the API keys file, and print them.

    Without an option, only print them. Servers apply a change within seconds.
    """
    from llama2_server.admission.keys import keys_editor
    from llama2_server.admission.keys.account_limits import NO_LIMITS

    content = keys_editor.read_file(file)
    limits = content.accounts.get(account, NO_LIMITS)
    if account not in content.accounts and all(record.account != account for record in content.keys.values()):
        exit_with_error(f"ACCOUNT: {file} has no key of this account; `llama2-server keys list` prints the accounts")
    changes: dict[str, object] = {}
    if requests_per_minute is not None:
        changes["requests_per_minute"] = None if requests_per_minute == "card" else requests_per_minute
    if neurons_per_month is not None:
        changes["neurons_per_month"] = None if neurons_per_month == "none" else neurons_per_month
    if changes:
        limits = _changed(limits, changes)
        keys_editor.edit(file, {}, {account: None if limits == NO_LIMITS else limits})
    requests, neurons = _texts(limits)
    click.echo(f"account {account}: requests per minute: {requests}; neurons per month: {neurons}")


@keys.command()
@click.argument("key_id")
@_file_option(required=True)
def revoke(key_id: str, file: Path) -> None:
    """Remove the entry of KEY_ID, the 12 characters after l2_ in a key. Servers reject the key within seconds."""
    from llama2_server.admission.keys import keys_editor

    record = _find(file, key_id)
    keys_editor.edit(file, {key_id: None})
    click.echo(f"revoked {key_id} of account {record.account}")


@keys.command()
@click.argument("key_id")
@expires_option
@click.option(
    "--keep-days",
    type=click.IntRange(min=0),
    default=KEEP_DAYS,
    metavar="DAYS",
    help=f"Days until the old key expires; 0 removes it at once.  [default={KEEP_DAYS}]",
)
@_file_option(required=True)
def rotate(key_id: str, expires: date | None, keep_days: int, file: Path) -> None:
    """Create another API key for the account of KEY_ID, print it, and let the old key expire."""
    from llama2_server.admission.keys import keys_editor
    from llama2_server.admission.keys.keys_file import new_key, parse

    record = _find(file, key_id)
    key, entry = new_key(record.account, record.name, expires)
    last_day = _today() + timedelta(days=keep_days)
    if record.expires is not None:
        last_day = min(last_day, record.expires)
    old = None if keep_days == 0 else record.model_copy(update={"expires": last_day})
    keys_editor.edit(file, {**parse(file, f"keys:\n  {entry}\n").keys, key_id: old})
    fate = f"removed {key_id}" if old is None else f"{key_id} expires after {last_day}"
    _print_key(key, f"added to {file} as {_id_of(key)}; {fate}")


def _find(file: Path, key_id: str) -> "KeyRecord":
    from llama2_server.admission.keys import keys_editor

    records = keys_editor.read_file(file).keys
    # A whole key is a secret, so the message never repeats the argument.
    if key_id not in records:
        exit_with_error(f"KEY_ID: {file} has no such key; `llama2-server keys list` prints the ids")
    return records[key_id]


def _changed(limits: "AccountLimits", changes: dict[str, object]) -> "AccountLimits":
    from pydantic import ValidationError

    from llama2_server.admission.keys.account_limits import AccountLimits

    try:
        return AccountLimits.model_validate({**limits.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        option = f"--{first['loc'][0]}".replace("_", "-")
        exit_with_error(f"{option}: {first['msg']}; see llama2-server keys limit --help")


def _texts(limits: "AccountLimits") -> tuple[str, str]:
    requests, neurons = limits.requests_per_minute, limits.neurons_per_month
    return "card" if requests is None else str(requests), "none" if neurons is None else f"{neurons:f}"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())


def _id_of(key: str) -> str:
    return key.split("_", 2)[1]


def _today() -> date:
    return datetime.now(UTC).date()
