"""What the operator does besides serving: `llama2-server keys` and `llama2-server usage`."""

import asyncio
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.cli.admin import admin
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage

COSTS = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.3672")}
HEADER = "account\tdate\tmodel\trequests\tinput_tokens\toutput_tokens\tcached_tokens\tneurons"


@pytest.fixture
def ledger_directory(tmp_path: Path) -> Path:
    """A data directory whose ledger holds one request of account 42 and one of account 7."""

    async def write() -> None:
        ledger = await Ledger.open(data_directory=tmp_path, neuron_costs=COSTS)
        for account, counts in (("42", TokenUsage(3, 5)), ("7", TokenUsage(1, 1))):
            ledger.admit(f"request-of-{account}", account, "model")
            ledger.finish(f"request-of-{account}", "MAX_TOKENS", counts)
        await ledger.close()

    asyncio.run(write())
    return tmp_path


def run(*arguments: str, **variables: str) -> str:
    """The standard output of a command that succeeds."""
    done = CliRunner().invoke(admin, arguments, env=variables, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_new_key_works_with_the_line_that_is_printed(tmp_path: Path) -> None:
    """The printed line, put under `keys:`, makes the printed key valid."""
    *_, key, _, _, line = run("keys", "new", "42", "--name", "Alice").splitlines()
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n{line}\n")
    assert ApiKeyAuthenticator(file).authenticate((("authorization", f"Bearer {key}"),)).id == "42"
    assert key not in yaml.safe_dump(yaml.safe_load(file.read_text()))


def test_usage_comes_from_where_the_servers_write(ledger_directory: Path, tmp_path: Path) -> None:
    """The ledger is found by flag, by the servers' environment and by their settings file alike."""
    config = tmp_path / "settings.yaml"
    config.write_text(f"data_directory: {ledger_directory}\n")
    printed = run("usage", "--data-directory", str(ledger_directory))
    assert printed == run("usage", LLAMA2_DATA_DIRECTORY=str(ledger_directory))
    assert printed == run("usage", "--config", str(config))
    assert printed == run("usage", "--usage-url", f"sqlite:///{ledger_directory / 'usage.db'}")
    header, *rows = printed.splitlines()
    assert header == HEADER
    assert [row.split("\t")[0] for row in rows] == ["42", "7"]


def test_usage_of_one_account(ledger_directory: Path) -> None:
    """`--account` prints that account's totals only, neurons exact."""
    _, row = run("usage", "--account", "42", "--data-directory", str(ledger_directory)).splitlines()
    account, _, model, *counts = row.split("\t")
    assert (account, model, counts) == ("42", "model", ["1", "3", "5", "0", "2.9376"])


def test_unusable_settings_are_refused(tmp_path: Path) -> None:
    """A ledger that cannot be had ends with exit code 2 and a line on standard error."""
    for arguments in (["--usage-url", "mysql://here"], ["--config", str(tmp_path / "missing.yaml")]):
        done = CliRunner().invoke(admin, ["usage", *arguments])
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("llama2-server: ")


def test_a_directory_without_a_ledger_is_named(tmp_path: Path) -> None:
    """Where no server has kept usage yet the directory is named, and no empty ledger is left in it."""
    done = CliRunner().invoke(admin, ["usage", "--data-directory", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"llama2-server: data_directory: {tmp_path} holds no ledger")
    assert not list(tmp_path.iterdir())
