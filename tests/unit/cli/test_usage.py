"""`llama2-server usage`: totals of the ledger that the servers write."""

import asyncio
from decimal import Decimal
from pathlib import Path

import pytest
from tests.unit.cli.runner import error, output

from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage

COSTS = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.3672")}
HEADER = "account\tdate\tmodel\trequests\tinput_tokens\toutput_tokens\tcached_tokens\tneurons"


@pytest.fixture
def ledger_directory(tmp_path: Path) -> Path:
    """A data directory whose ledger has one request of account 42 and one of account 7."""

    async def write() -> None:
        ledger = await Ledger.open(data_directory=tmp_path, neuron_costs=COSTS)
        for account, tokens in (("42", TokenUsage(3, 5)), ("7", TokenUsage(1, 1))):
            ledger.admit(f"request-of-{account}", account, "model")
            ledger.finish(f"request-of-{account}", "MAX_TOKENS", tokens)
        await ledger.close()

    asyncio.run(write())
    return tmp_path


def test_ledger_is_found_by_flag_environment_and_file(ledger_directory: Path, tmp_path: Path) -> None:
    """A flag, the servers' environment and their settings file all lead to the same ledger."""
    config = tmp_path / "settings.yaml"
    config.write_text(f"data_directory: {ledger_directory}\n")
    printed = output("usage", "--data-directory", str(ledger_directory))
    assert printed == output("usage", LLAMA2_DATA_DIRECTORY=str(ledger_directory))
    assert printed == output("usage", "--config", str(config))
    assert printed == output("usage", "--usage-url", f"sqlite:///{ledger_directory / 'usage.db'}")
    header, *rows = printed.splitlines()
    assert header == HEADER
    assert [row.split("\t")[0] for row in rows] == ["42", "7"]


def test_account_option_selects_one_account(ledger_directory: Path) -> None:
    """`--account` prints only that account's totals, with exact neurons."""
    _, row = output("usage", "--account", "42", "--data-directory", str(ledger_directory)).splitlines()
    account, _, model, *counts = row.split("\t")
    assert (account, model, counts) == ("42", "model", ["1", "3", "5", "0", "2.9376"])


def test_days_select_the_totals(ledger_directory: Path) -> None:
    """`--since` and `--until` are inclusive days; a range without requests prints only the header."""
    directory = ["--data-directory", str(ledger_directory)]
    _, *rows = output("usage", *directory).splitlines()
    day = rows[0].split("\t")[1]
    assert output("usage", "--since", day, "--until", day, *directory).splitlines() == [HEADER, *rows]
    assert output("usage", "--until", "2001-01-01", *directory).splitlines() == [HEADER]


def test_day_of_another_form_is_rejected() -> None:
    """The error names the option and the form of a day."""
    assert error("usage", "--since", "yesterday") == "--since: must be a day of the form YYYY-MM-DD"


def test_unusable_settings_are_rejected(tmp_path: Path) -> None:
    """An unusable ledger or settings file ends with exit code 2 and one line on standard error."""
    missing = tmp_path / "missing.yaml"
    assert error("usage", "--config", str(missing)) == f"--config: cannot read {missing}: No such file or directory"
    assert "--usage-url: mysql is not supported; use sqlite:///FILE" in error("usage", "--usage-url", "mysql://here")


@pytest.mark.parametrize("as_flag", [True, False])
def test_directory_without_a_ledger_is_named(as_flag: bool, tmp_path: Path) -> None:
    """The error names the directory as the user set it, and no empty ledger is created in it."""
    flags = ["--data-directory", str(tmp_path)] if as_flag else []
    variables = {} if as_flag else {"LLAMA2_DATA_DIRECTORY": str(tmp_path)}
    name = "--data-directory" if as_flag else "LLAMA2_DATA_DIRECTORY"
    assert error("usage", *flags, **variables).startswith(f"{name}: {tmp_path} has no usage ledger")
    assert not list(tmp_path.iterdir())
