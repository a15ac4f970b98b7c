"""The pages of `examples/clients` agree with its files."""

import json
import re
from pathlib import Path

import pytest
from google.rpc import error_details_pb2, status_pb2
from tests.integration.examples.clients.client_program import CLIENTS, TOOLCHAINS, command_blocks, lines_of_code
from tests.support.repository import ROOT

from llama2_client import channel

PAGE = (CLIENTS / "README.md").read_text()


def test_the_service_config() -> None:
    """The page shows the programs' service config, which is the Python client's own."""
    (block,) = re.findall(r"(?ms)^```json\n(.*?)^```", PAGE)
    assert block == (CLIENTS / "service_config.json").read_text()
    assert json.loads(block) == channel.service_config()


def test_the_curl_commands() -> None:
    """The page's curl commands are commands of the Envoy example, whose tests send them."""
    curls = [line for block in command_blocks(CLIENTS / "README.md") for line in block if line.startswith("curl ")]
    assert curls
    assert set(curls) <= set((ROOT / "examples/envoy/README.md").read_text().splitlines())


@pytest.mark.parametrize("language", TOOLCHAINS)
def test_sizes_and_packages(language: str) -> None:
    """A program has at most 60 lines of code, a README at most 25 lines, and CI installs the README's packages."""
    folder = CLIENTS / language
    (program,) = folder.glob("[Cc]hat.*")
    assert len(lines_of_code(program)) <= 60
    assert len((folder / "README.md").read_text().splitlines()) <= 25
    (install,) = command_blocks(folder / "README.md")[0]
    ci = (ROOT / ".ci/run").read_text().replace("\\\n  ", "")
    assert re.search(rf"(?m)\bneed {re.escape(install.removeprefix('apt-get install '))}$", ci)
    assert f"({language}/README.md)" in PAGE


@pytest.mark.parametrize("module", [status_pb2, error_details_pb2])
def test_the_copied_protos(module: object) -> None:
    """The copies of google/rpc have the version of the Python package, with its license header."""
    source = Path(str(module.__file__))  # type: ignore[attr-defined]
    original = source.with_name(source.name.replace("_pb2.py", ".proto")).read_text()
    assert (CLIENTS / "protos/google/rpc" / source.name.replace("_pb2.py", ".proto")).read_text() == original
    assert "Licensed under the Apache License, Version 2.0" in original
