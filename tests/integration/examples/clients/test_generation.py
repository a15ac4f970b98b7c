"""The code of languages that have no program in `examples/clients`, generated with `buf.gen.yaml`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.integration.examples.clients.client_program import CLIENTS, require_toolchain
from tests.support.repository import ROOT

BUF = Path(sys.executable).with_name("buf")
# Per language: the installed programs, and files that they generate for the service and the error details.
LANGUAGES = {
    "csharp": (["protoc"], {"TextGeneration.cs", "ErrorDetails.cs"}),
    "kotlin": (["protoc"], {"GenerateRequestKt.kt", "RetryInfoKt.kt"}),
    "php": (["protoc", "grpc_php_plugin"], {"GenerateRequest.php", "TextGenerationServiceClient.php", "RetryInfo.php"}),
}


def entries(language: str, programs: list[str]) -> list[dict[str, Any]]:
    """Return the entries of `buf.gen.yaml` for a language whose plugins are installed; protoc has built-in plugins."""
    plugins = yaml.safe_load((ROOT / "buf.gen.yaml").read_text())["plugins"]
    return [
        entry for entry in plugins if entry["out"] == f"gen/{language}" and entry.get("local", "protoc") in programs
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_languages(language: str, tmp_path: Path) -> None:
    """`buf generate` writes the code of the service and, from the copied protos, of the error details."""
    programs, expected = LANGUAGES[language]
    require_toolchain(language, programs)
    template = yaml.safe_load((ROOT / "buf.gen.yaml").read_text())
    one = tmp_path / "buf.gen.yaml"
    one.write_text(yaml.safe_dump(template | {"plugins": entries(language, programs), "clean": False}))
    for inputs in ([], [str(CLIENTS.relative_to(ROOT) / "protos")]):
        command = [str(BUF), "generate", *inputs, "--template", str(one), "--output", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert expected <= {path.name for path in tmp_path.rglob("*.*")}
