"""`--help` and `--version` of `llama2-server`."""

from importlib.metadata import version

import pytest
from tests.unit.cli.runner import output

from llama2_server.config.settings import Group, Settings, default_of, description_of, group_of
from llama2_server.config.sources import flag_of

WITH_SETTINGS = [("--help",), ("-h",), ("serve", "--help"), ("settings", "--help")]


def sections_of(text: str) -> dict[str, list[str]]:
    """Return the lines of each section by its heading."""
    sections: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        if line.endswith(":") and not line.startswith(" "):
            sections[line.removesuffix(":")] = []
        elif sections:
            sections[next(reversed(sections))].append(line)
    return sections


@pytest.mark.parametrize("columns", [80, 100, 110, 120, 200])
@pytest.mark.parametrize("arguments", WITH_SETTINGS)
def test_each_setting_has_at_most_two_lines(arguments: tuple[str, ...], columns: int) -> None:
    """Every setting is in the section of its group, in at most two lines that fit the terminal."""
    printed = output(*arguments, columns=columns)
    sections = sections_of(printed)
    assert [heading for heading in sections if heading in list(Group)] == list(Group)
    for group in Group:
        keys = [key for key in Settings.model_fields if group_of(key) is group]
        entries = "\n".join(sections[group]).split("\n  --")
        assert [f"--{entry.strip(' -').split()[0]}" for entry in entries] == [flag_of(key) for key in keys]
        assert all(len(entry.splitlines()) <= 2 for entry in entries)
    assert all(len(line) <= columns for line in printed.splitlines())


@pytest.mark.parametrize("columns", [80, 120])
def test_each_setting_has_its_description_and_default(columns: int) -> None:
    """The first sentence of each description is complete, and the default is next to it."""
    words = " ".join(output("--help", columns=columns).split())
    for key in Settings.model_fields:
        assert description_of(key).split(". ")[0] in words
        assert not default_of(key) or f"[default={default_of(key)}]" in words


def test_wide_terminal_shows_most_settings_on_one_line() -> None:
    """At 120 columns the page is shorter than at 80 columns."""
    assert len(output("--help", columns=120).splitlines()) < 0.8 * len(output("--help", columns=80).splitlines())


def test_flags_show_their_values() -> None:
    """Choices, units and both flags of a switch are visible."""
    printed = output("--help", columns=80)
    for flag in (
        "--log-level [debug|info|warning|error]  [default=info]",
        "--reflection / --no-reflection  [default=true]",
        "--queue-timeout-seconds SECONDS  [default=300]",
        "--max-concurrent-streams NUMBER",
        "--tls-key FILE",
    ):
        assert f"\n  {flag}\n" in printed


def test_descriptions_are_sentences() -> None:
    """Every setting has a description that starts with a capital letter or a name and ends with a full stop."""
    for key in Settings.model_fields:
        assert description_of(key).endswith(".")
        assert description_of(key).startswith(("gRPC", "YAML")) or description_of(key)[0].isupper()


def test_help_lists_the_commands() -> None:
    """`--help` lists the commands in the order of their importance."""
    commands = sections_of(output("--help"))["Commands"]
    assert [line.split()[0] for line in commands] == ["serve", "settings", "keys", "receipts", "usage", "weights"]


@pytest.mark.parametrize(
    "arguments", [("keys",), ("keys", "new"), ("usage",), ("weights",), ("weights", "fetch"), ("serve",)]
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_each_command_has_help(arguments: tuple[str, ...], flag: str) -> None:
    """`-h` and `--help` print the usage of every command."""
    assert output(*arguments, flag).startswith(f"Usage: llama2-server {' '.join(arguments)} [OPTIONS]")


def test_version_is_the_package_version() -> None:
    """`--version` prints the program's name and the version of the package."""
    assert output("--version") == f"llama2-server {version('llama2-grpc')}\n"
