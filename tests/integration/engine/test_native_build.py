"""The build hook compiles the native library."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hatch_build
import pytest

from llama2_server.engine.native import library as native


def run_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[str], Path]:
    """Run the build hook of a wheel on a copy of the source; return its build data, warnings and the library's path."""
    shutil.copytree(
        hatch_build.NATIVE_SOURCE.parent, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so")
    )
    source = tmp_path / "decode.cpp"
    monkeypatch.setattr(hatch_build, "NATIVE_SOURCE", source)
    monkeypatch.setattr(hatch_build, "_generate_stubs", lambda: None)
    warnings: list[str] = []
    app: Any = SimpleNamespace(display_warning=warnings.append)
    build_data: dict[str, Any] = {}
    build_hook = hatch_build.BuildHook(str(tmp_path), {}, None, None, str(tmp_path), "wheel", app)  # type: ignore[arg-type]
    build_hook.initialize("standard", build_data)
    return build_data, warnings, source.with_suffix(".so")


@pytest.mark.parametrize("variable", [{"CXX": "false"}, {"CXX": "/no/such/compiler"}, {"PATH": ""}])
def test_an_install_without_a_compiler_succeeds_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]
) -> None:
    """Without a working compiler: one warning, a wheel for every platform, and no library of an earlier build."""
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "decode.so").write_bytes(b"from an earlier build")
    build_data, warnings, built = run_hook(tmp_path, monkeypatch)
    assert not built.exists()
    assert build_data == {}
    (warning,) = warnings
    assert warning.startswith("the native library was not built, so models on a CPU run in torch: ")
    assert "\n" not in warning


def test_an_install_with_a_compiler_builds_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is for this platform and any Python 3; the server loads the library."""
    if not any(map(shutil.which, ["c++", "g++", "clang++"])):
        pytest.skip("NOT TESTED: no C++ compiler found")
    build_data, warnings, built = run_hook(tmp_path, monkeypatch)
    assert warnings == []
    assert build_data["pure_python"] is False
    assert build_data["tag"].startswith("py3-none-")
    assert not build_data["tag"].endswith("any")
    monkeypatch.setattr(native, "LIBRARY", built)
    native.load_library.cache_clear()
    assert native.load_library().llama2_interface() == native.INTERFACE_VERSION
    native.load_library.cache_clear()
