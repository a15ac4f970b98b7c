"""`llama2-server usage`: totals of the ledger that the servers write."""

import asyncio
import contextlib
import json
import sqlite3
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
from tests.unit.cli.runner import error, invoke, output

from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage

COSTS = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.3672")}
HEADER = "account,date,model,requests,input_tokens,output_tokens,cached_tokens,neurons"
CSV = ("usage", "--format", "csv")


@pytest.fixture
def ledger_directory(tmp_path: Path) -> Path:
    """A data directory whose ledger has one request of account 42 and one of account 7."""

    async def write() -> None:
        ledger = await Ledger.open(data_directory=tmp_path, neuron_costs=COSTS)
        for account, tokens in (("42", TokenUsage(3, 5)), ("7", TokenUsage(1, 1))):
            await ledger.admit(f"request-of-{account}", account, "model")
            ledger.finish(f"request-of-{account}", "MAX_TOKENS", tokens)
        await ledger.close()

    asyncio.run(write())
    return tmp_path


def test_ledger_is_found_by_flag_environment_and_file(ledger_directory: Path, tmp_path: Path) -> None:
    """A flag, the servers' environment and their settings file all lead to the same ledger."""
    config = tmp_path / "settings.yaml"
    config.write_text(f"data_directory: {ledger_directory}\n")
    printed = output(*CSV, "--data-directory", str(ledger_directory))
    assert printed == output(*CSV, LLAMA2_DATA_DIRECTORY=str(ledger_directory))
    assert printed == output(*CSV, "--config", str(config))
    header, *rows = printed.splitlines()
    assert header == HEADER
    assert [row.split(",")[0] for row in rows] == ["42", "7"]


def test_account_option_selects_one_account(ledger_directory: Path) -> None:
    """`--account` prints only that account's totals, with exact neurons."""
    _, row = output(*CSV, "--account", "42", "--data-directory", str(ledger_directory)).splitlines()
    account, _, model, *counts = row.split(",")
    assert (account, model, counts) == ("42", "model", ["1", "3", "5", "0", "2.9376"])


def test_days_select_the_totals(ledger_directory: Path) -> None:
    """`--since` and `--until` are inclusive days; a range without requests prints only the header."""
    directory = ["--data-directory", str(ledger_directory)]
    _, *rows = output(*CSV, *directory).splitlines()
    day = rows[0].split(",")[1]
    assert output(*CSV, "--since", day, "--until", day, *directory).splitlines() == [HEADER, *rows]
    assert output(*CSV, "--until", "2001-01-01", *directory).splitlines() == [HEADER]


def test_day_of_another_form_is_rejected() -> None:
    """The error names the option and the form of a day."""
    assert error("usage", "--since", "yesterday") == "--since: must be a day of the form YYYY-MM-DD"


def test_unusable_settings_are_rejected(tmp_path: Path) -> None:
    """An unusable ledger or settings file ends with exit code 2 and one line on standard error."""
    missing = tmp_path / "missing.yaml"
    assert error("usage", "--config", str(missing)) == f"--config: cannot read {missing}: No such file or directory"
    assert "--usage-url: mysql is not supported; use postgresql://" in error("usage", "--usage-url", "mysql://here")


@pytest.mark.parametrize("as_flag", [True, False])
def test_directory_without_a_ledger_is_named(as_flag: bool, tmp_path: Path) -> None:
    """The error names the directory as the user set it, and no empty ledger is created in it."""
    flags = ["--data-directory", str(tmp_path)] if as_flag else []
    variables = {} if as_flag else {"LLAMA2_DATA_DIRECTORY": str(tmp_path)}
    name = "--data-directory" if as_flag else "LLAMA2_DATA_DIRECTORY"
    assert error("usage", *flags, **variables).startswith(f"{name}: {tmp_path} has no usage ledger")
    assert not list(tmp_path.iterdir())


def identity(day: datetime) -> datetime:
    """Return the time."""
    return day


def test_month_has_one_row_per_account_and_model(tmp_path: Path) -> None:
    """The days of a month in UTC are summed; other months do not count, and February has its own length."""
    texts = ("2028-01-31T23:59Z", "2028-02-01T00:00Z", "2028-02-29T23:59Z", "2028-03-01T00:00Z")
    days = list(map(datetime.fromisoformat, texts))

    async def write() -> None:
        for day in days:
            ledger = await Ledger.open(data_directory=tmp_path, neuron_costs=COSTS, now=partial(identity, day))
            for account in ("42", "7"):
                await ledger.admit(f"{day}-{account}", account, "model")
                ledger.finish(f"{day}-{account}", "MAX_TOKENS", TokenUsage(3, 5))
            await ledger.close()

    asyncio.run(write())
    directory = ("--data-directory", str(tmp_path))
    header = HEADER.replace("date", "month")
    rows = [f"{account},2028-02,model,2,6,10,0,5.8752" for account in ("42", "7")]
    assert output(*CSV, "--month", "2028-02", *directory).splitlines() == [header, *rows]
    table = output("usage", "--month", "2028-02", "--account", "42", *directory).splitlines()
    assert [line.split() for line in table] == [header.split(","), rows[0].split(",")]
    assert table[0].index("requests") + len("requests") == table[1].index(" 2 ") + 2  # numbers are right-aligned
    (total,) = json.loads(output("usage", "--format", "json", "--month", "2028-02", "--account", "7", *directory))
    assert total == {
        "account": "7",
        "month": "2028-02",
        "model": "model",
        "requests": 2,
        "input_tokens": 6,
        "output_tokens": 10,
        "cached_tokens": 0,
        "neurons": "5.8752",
    }


def test_month_without_a_value_is_the_current_one(ledger_directory: Path) -> None:
    """The usage of today is in it."""
    _, *rows = output(*CSV, "--month", "--data-directory", str(ledger_directory)).splitlines()
    assert {row.split(",")[1] for row in rows} == {f"{datetime.now(UTC):%Y-%m}"}


def test_month_excludes_days() -> None:
    """A month and a range of days cannot be combined; a month has one form."""
    combined = error("usage", "--month", "2028-02", "--since", "2028-02-02")
    assert combined == "--month: cannot be combined with --since and --until; leave them out"
    assert error("usage", "--month", "February") == "--month: must be a month of the form YYYY-MM"


def test_maintenance_of_a_data_directory(ledger_directory: Path) -> None:
    """`check` and `retry` work on a data directory; `forward` needs a database."""
    flags = ["--data-directory", str(ledger_directory)]
    assert output("usage", "check", *flags) == "the daily totals equal the records\n"
    assert output("usage", "retry", *flags) == "0 records will be sent again\n"
    assert error("usage", "forward", *flags).startswith("--usage-url: missing; ")
    with contextlib.closing(sqlite3.connect(ledger_directory / "usage.db", isolation_level=None)) as connection:
        connection.execute("UPDATE usage_daily_totals SET output_tokens = 9 WHERE account = '42'")
    result = invoke(("usage", "check", *flags), {})
    assert result.exit_code == 2
    assert result.stderr.endswith("usage check: totals differ from the records; run it with --repair\n")
    assert output("usage", "check", "--repair", *flags).endswith("repaired\n")
    assert output("usage", "check", *flags) == "the daily totals equal the records\n"
