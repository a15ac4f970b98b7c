"""A change of the sources that decide the bits of a text raises ALGORITHM_VERSION."""

from pathlib import Path

import pytest
from tools.checks import algorithm

from llama2_server.engine.fingerprint.execution import ALGORITHM_VERSION


def test_algorithm_version_belongs_to_the_sources() -> None:
    """The message says what to do: raise the version, or state that no bit changes."""
    problem = algorithm.problem()
    assert problem is None, problem


@pytest.mark.parametrize(
    ("name", "before", "after", "changes"),
    [
        ("sampling.py", '"""A text."""\nx = 1  # one\n', '"""Another text."""\n\nx = 1\n', False),
        ("sampling.py", "x = 1\n", "x = 2\n", True),
        ("native/decode.cpp", "int x = 1;  // one\n", "int x\n    = 1; /* 1 */\n", False),
        ("native/decode.cpp", 'auto x = "// a";\n', 'auto x = "// b";\n', True),
        ("native/kernels/simd.hpp", "a + b;\n", "a - b;\n", True),
    ],
)
def test_only_code_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str, after: str, *, changes: bool
) -> None:
    """Comments, docstrings and layout can change freely."""
    monkeypatch.setattr(algorithm, "ENGINE", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = []
    for content in (before, after):
        path.write_text(content)
        digests.append(algorithm.digest())
    assert (digests[0] != digests[1]) is changes


def test_same_version_with_other_sources_must_be_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program stores other sources of one version only with `--same-bits`."""
    monkeypatch.setattr(algorithm, "STORED", tmp_path / "algorithm.json")
    monkeypatch.setattr(algorithm, "digest", lambda: "before")
    monkeypatch.setattr("sys.argv", ["algorithm"])
    algorithm.main()
    assert algorithm.problem() is None
    monkeypatch.setattr(algorithm, "digest", lambda: "after")
    with pytest.raises(SystemExit, match="raise ALGORITHM_VERSION"):
        algorithm.main()
    assert "raise ALGORITHM_VERSION" in str(algorithm.problem())
    monkeypatch.setattr("sys.argv", ["algorithm", "--same-bits"])
    algorithm.main()
    assert algorithm.problem() is None
    monkeypatch.setattr(algorithm, "ALGORITHM_VERSION", ALGORITHM_VERSION + 1)
    assert "has changed" in str(algorithm.problem())
    monkeypatch.setattr("sys.argv", ["algorithm"])
    algorithm.main()
    assert algorithm.problem() is None
