"""`llama2-server keys limit`: quotas and budgets of accounts in the keys file."""

from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.cli.runner import error, invoke, output

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys import account_limits, keys_editor
from llama2_server.admission.keys.account_limits import AccountLimits
from llama2_server.admission.keys.keys_file import new_key, parse
from llama2_server.admission.keys.line_format import parse_lines

LIMITS = st.builds(
    AccountLimits,
    requests_per_minute=st.none() | st.integers(1, 1_000_000),
    neurons_per_month=st.none() | st.decimals(0, 10**9, places=9) | st.integers(0, 10**9).map(Decimal),
)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A keys file with a key of the account 42."""
    path = tmp_path / "keys.yaml"
    output("keys", "new", "42", "--api-keys-file", str(path))
    return path


def limit(file: Path, *arguments: str) -> str:
    """Run `keys limit` on the file, and return its output."""
    return output("keys", "limit", *arguments, "--api-keys-file", str(file))


def test_limits_are_set_shown_and_removed(file: Path) -> None:
    """Each option changes its limit only; without limits, the section is as it was before."""
    before = file.read_text()
    assert limit(file, "42") == "account 42: requests per minute: card; neurons per month: none\n"
    assert file.read_text() == before
    limit(file, "42", "--requests-per-minute", "60")
    assert limit(file, "42", "--neurons-per-month", "1000.5") == (
        "account 42: requests per minute: 60; neurons per month: 1000.5\n"
    )
    assert file.read_text() == f"{before}accounts:\n  '42': {{requests_per_minute: 60, neurons_per_month: '1000.5'}}\n"
    assert ApiKeyAuthenticator(file).limits("42") == AccountLimits(
        requests_per_minute=60, neurons_per_month=Decimal("1000.5")
    )
    assert ApiKeyAuthenticator(file).limits("other") == AccountLimits()
    table = output("keys", "list", "--api-keys-file", str(file)).splitlines()
    assert table[-2:] == ["account  requests per minute  neurons per month", "42       60                   1000.5"]
    limit(file, "42", "--requests-per-minute", "card", "--neurons-per-month", "none")
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("42", "--requests-per-minute", "0"), "--requests-per-minute: Input should be greater than or equal to 1; "),
        (("42", "--requests-per-minute", "1.5"), "--requests-per-minute: Input should be a valid integer"),
        (("42", "--neurons-per-month", "-1"), "--neurons-per-month: Input should be greater than or equal to 0; "),
        (("42", "--neurons-per-month", "much"), "--neurons-per-month: Input should be a valid decimal; "),
        (("42", "--neurons-per-month", "nan"), "--neurons-per-month: Input should be a finite number; "),
        (
            ("42", "--neurons-per-month", "0.0000000001"),
            "--neurons-per-month: Decimal input should have no more than 9",
        ),
        (("7", "--neurons-per-month", "1"), "ACCOUNT: "),
    ],
)
def test_a_wrong_limit_is_one_line(file: Path, arguments: tuple[str, ...], message: str) -> None:
    """The file stays as it is."""
    before = file.read_text()
    assert error("keys", "limit", *arguments, "--api-keys-file", str(file)).startswith(message)
    assert file.read_text() == before


def test_a_wrong_limit_in_the_file_is_one_line(file: Path) -> None:
    """The message names the account and the field."""
    file.write_text(f"{file.read_text()}accounts:\n  acme: {{neurons_per_month: much}}\n")
    result = invoke(["keys", "list", "--api-keys-file", str(file)], {})
    assert result.exit_code == 2
    assert f"--api-keys-file: {file}: accounts.acme.neurons_per_month: " in result.stderr


@given(st.dictionaries(NAMES, LIMITS, min_size=1), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_edits_agree_with_yaml(limits: dict[str, AccountLimits], removed: int) -> None:
    """Whatever the names and limits: the fast reader returns what YAML does, and edits change only their accounts."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "keys.yaml"
        keys = parse(file, f"keys:\n  {new_key('first')[1]}\n").keys
        keys_editor.edit(file, keys, limits)
        assert parse_lines(file.read_text()) in (None, yaml.safe_load(file.read_text()))
        assert keys_editor.read_file(file).accounts == limits
        kept = dict(limits)
        for account_id in list(limits)[:removed]:
            keys_editor.edit(file, {}, {account_id: None})
            del kept[account_id]
        content = keys_editor.read_file(file)
        assert (content.accounts, content.keys) == (kept, keys)


def test_usual_lines_are_read_fast() -> None:
    """The lines that the commands write are not left to YAML, which takes seconds for thousands of accounts."""
    lines = "".join(
        f"  {account_limits.entry(f'account-{index}', AccountLimits(neurons_per_month=Decimal(index)))}\n"
        for index in range(500)
    )
    text = f"keys:\n  {new_key('42')[1]}\naccounts:\n{lines}"
    assert parse_lines(text) == yaml.safe_load(text)
