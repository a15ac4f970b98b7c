"""Build hook: generates the Python stubs beside the .proto files, so that none of them is ever committed."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO_ROOT = Path(__file__).parent / "protos"


class StubsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before every build, editable installs included."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate messages, services and their type stubs; raises RuntimeError if a .proto file does not compile."""
        # grpc_tools is a build requirement only, absent where this module is merely linted.
        import grpc_tools
        from grpc_tools import protoc

        sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
        outputs = [f"--{kind}_out={PROTO_ROOT}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
        bundled = Path(grpc_tools.__file__).parent / "_proto"
        if protoc.main(["protoc", f"-I{PROTO_ROOT}", f"-I{bundled}", *outputs, *sources]) != 0:
            raise RuntimeError("protoc refused the .proto files; its messages are above")
