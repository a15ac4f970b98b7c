"""Build hook that generates the Python stubs and descriptors of the .proto files and compiles the native library."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PROTO_ROOT = ROOT / "protos"
CONFORMANCE_PROTO = ROOT / "conformance/v1/conformance.proto"
# google/api, which hosted_endpoint.proto imports; its stubs are in googleapis-common-protos.
THIRD_PARTY_PROTOS = ROOT / "third_party"
# The protos with their comments, which the stubs do not contain; reflection serves them.
DESCRIPTORS = PROTO_ROOT / "llama2/v1/descriptors.pb"
NATIVE_SOURCE = ROOT / "server/llama2_server/engine/native/decode.cpp"
# No -march: the instruction set is selected at run time, so one build runs on every processor of the family.
# -ffp-contract=off fuses multiplications and additions only where the source calls fma(), so that all instruction sets
# of the portable kernels compute the same bits.
COMPILER_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-ffp-contract=off"),
]


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Build hook that runs before every build, editable installs included."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the stubs and descriptors and, if possible, compile the native library.

        Raises:
            RuntimeError: a .proto file does not compile.
        """
        _generate_stubs()
        if self.target_name != "wheel":
            return
        error = build_native(NATIVE_SOURCE)
        if error is None:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        else:
            self.app.display_warning(f"the native library was not built, so models on a CPU run in torch: {error}")


def build_native(source: Path) -> str | None:
    """Compile the library next to its source; return None or, on failure, the one-line reason."""
    library = source.with_suffix(".so")
    # An outdated library would not match the source.
    library.unlink(missing_ok=True)
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return f"no C++ compiler found ({', '.join(names)})"
    # Compile to another name first, so that a running server keeps the library that it has loaded.
    unfinished = library.with_suffix(".so.part")
    command = [compiler, *COMPILER_FLAGS, str(source), "-o", str(unfinished)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own compiler
    if result.returncode != 0 or not unfinished.exists():
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        return f"{compiler} failed: {errors[0] if errors else f'exit code {result.returncode}'}"
    unfinished.replace(library)
    return None


def _platform() -> str:
    """Return the platform of the wheel tag; the library depends on system and processor, not on the Python version."""
    # A requirement of hatchling, so it can be missing where this module is only linted.
    from packaging.tags import platform_tags

    return next(tag for tag in platform_tags() if "linux_" not in tag or tag.startswith("linux_"))


def _generate_stubs() -> None:
    # A build requirement, so it can be missing where this module is only linted.
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={PROTO_ROOT}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    outputs += [f"--descriptor_set_out={DESCRIPTORS}", "--include_imports", "--include_source_info"]
    roots = (PROTO_ROOT, THIRD_PARTY_PROTOS, Path(grpc_tools.__file__).parent / "_proto")
    includes = [f"-I{root}" for root in roots]
    runs = [[*includes, *outputs, *sources]]
    if CONFORMANCE_PROTO.exists():  # the source distribution of the package may omit the kit
        kit_outputs = [f"--{kind}_out={ROOT}" for kind in ("python", "pyi")]
        runs.append([f"-I{ROOT}", *includes, *kit_outputs, str(CONFORMANCE_PROTO.relative_to(ROOT))])
    if any(protoc.main(["protoc", *arguments]) != 0 for arguments in runs):
        raise RuntimeError("protoc: cannot compile the .proto files; fix the errors printed above")
