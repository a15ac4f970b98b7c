"""`llama2-server keys`: new API keys."""

from pathlib import Path

import yaml
from tests.unit.cli.runner import output

from llama2_server.admission.accounts import ApiKeyAuthenticator


def test_new_key_is_valid_with_the_printed_entry(tmp_path: Path) -> None:
    """The printed entry, added under `keys:`, makes the printed key valid."""
    *_, key, _, _, entry = output("keys", "new", "42", "--name", "Alice").splitlines()
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n{entry}\n")
    assert ApiKeyAuthenticator(file).authenticate((("authorization", f"Bearer {key}"),)).id == "42"
    assert key not in yaml.safe_dump(yaml.safe_load(file.read_text()))
