"""Build hook: makes what is never committed: the Python stubs of the .proto files, and the native decode step."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PROTO_ROOT = ROOT / "protos"
NATIVE_SOURCE = ROOT / "server/llama2_server/engine/native/decode.cpp"
# For every processor of the family: the instruction set is chosen at run time. Products and sums are fused where the
# source says so and nowhere else, so that all instruction sets compute the same bits.
COMPILER_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-ffp-contract=off"),
]


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before every build, editable installs included."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the stubs, and build the native step where that is possible.

        Raises RuntimeError if a .proto file does not compile.
        """
        _generate_stubs()
        if self.target_name != "wheel":
            return
        problem = build_native(NATIVE_SOURCE)
        if problem is None:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        else:
            self.app.display_warning(f"no native steps, a CPU will run in torch: {problem}")


def build_native(source: Path) -> str | None:
    """Compile the library beside its source; one line that says why where that cannot be done."""
    library = source.with_suffix(".so")
    # A library from before would not fit the source any more.
    library.unlink(missing_ok=True)
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return f"there is no C++ compiler ({', '.join(names)})"
    # To another name first: a server that runs keeps the library that it has loaded.
    unfinished = library.with_suffix(".so.part")
    command = [compiler, *COMPILER_FLAGS, str(source), "-o", str(unfinished)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own compiler
    if result.returncode != 0 or not unfinished.exists():
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        return f"{compiler} failed: {errors[0] if errors else f'exit code {result.returncode}'}"
    unfinished.replace(library)
    return None


def _platform() -> str:
    """The wheel tag's platform: the library needs no certain Python, but this system and processor."""
    # Of hatchling's own requirements, absent where this module is merely linted.
    from packaging.tags import platform_tags

    return next(tag for tag in platform_tags() if "linux_" not in tag or tag.startswith("linux_"))


def _generate_stubs() -> None:
    # grpc_tools is a build requirement only, absent where this module is merely linted.
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={PROTO_ROOT}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    bundled = Path(grpc_tools.__file__).parent / "_proto"
    if protoc.main(["protoc", f"-I{PROTO_ROOT}", f"-I{bundled}", *outputs, *sources]) != 0:
        raise RuntimeError("protoc refused the .proto files; its messages are above")
