"""Who may import whom: the layers of the design, held by reading every import statement."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("llama2", "llama2_server", "llama2_client")

# Module or package under server/llama2_server -> what of ours it may import, besides modules of its own package.
ALLOWED: dict[str, set[str]] = {
    "engine": set(),
    "errors": set(),
    "settings": set(),
    "settings_sources": {"settings"},
    "card": set(),
    "health": set(),
    "telemetry": {"errors", "card"},
    "interceptor": {"errors", "telemetry"},
    "accounts": {"errors", "card"},
    "metering": {"errors", "card"},
    "ledger": {"errors", "card", "metering"},
    "redis_link": set(),
    "refusal": set(),
    "quota": {"errors", "card", "redis_link"},
    "cache": {"errors", "card", "redis_link"},
    "slots": {"errors", "card"},
    "flights": set(),
    "validation": {"llama2", "errors", "card", "engine"},
    "watchdog": {"engine", "errors"},
    "generation": {"accounts", "engine", "errors", "metering", "slots", "telemetry", "validation", "watchdog"},
    "probe": {"engine", "generation", "slots", "validation", "watchdog"},
    "readiness": set(),
    "replies": {"cache", "engine", "generation", "metering"},
    "admission": {"errors", "generation", "ledger", "metering", "replies", "telemetry"},
}
LOWER_PARTS = set(ALLOWED) | {"llama2"}
ALLOWED |= {
    "information": LOWER_PARTS - {"settings", "settings_sources", "engine"},
    "servicer": LOWER_PARTS - {"settings", "settings_sources"},
    "tls": set(),
    "preflight": {"accounts", "card", "ledger", "redis_link", "settings", "telemetry", "tls"},
    "stores": {"cache", "card", "ledger", "preflight", "quota", "settings"},
    "loading": {"accounts", "card", "engine", "preflight", "settings"},
    "speed": {"card", "engine", "settings"},
    "listening": {"llama2", "health", "information", "interceptor", "preflight", "servicer", "settings", "tls"},
    "readings": {"engine", "health", "listening", "servicer", "telemetry"},
    "admin": {"accounts", "engine", "ledger", "metering", "refusal", "settings_sources"},
    "__main__": {
        "accounts",
        "admin",
        "app",
        "card",
        "engine",
        "ledger",
        "preflight",
        "refusal",
        "settings_sources",
        "telemetry",
        "tls",
    },
    "__init__": set(),
}
ALLOWED["app"] = set(ALLOWED) | {"llama2"}
# Libraries that the engine may know; above all, no gRPC.
ENGINE_LIBRARIES = {"torch", "triton", "transformers", "safetensors", "sentencepiece", "huggingface_hub"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "server/llama2_server").parts[0].removesuffix(".py")


def ours(module: str) -> str | None:
    """The part that an import of ours names: `engine` for llama2_server.engine.model, `llama2` for the stubs."""
    top, *rest = module.split(".")
    if top == "llama2_server":
        return rest[0] if rest else None
    return top if top in OURS else None


@pytest.mark.parametrize("path", sorted((ROOT / "server").rglob("*.py")), ids=str)
def test_server_module_imports_only_what_it_may(path: Path) -> None:
    """Nothing flows back: a lower part never imports a higher one, nor the client."""
    parts = {part for module in imports(path) if (part := ours(module))}
    modules = {file.stem for file in (ROOT / "server/llama2_server").iterdir()} | set(OURS)
    assert parts & modules <= ALLOWED[part_of(path)] | {part_of(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "server/llama2_server/engine").rglob("*.py")), ids=str)
def test_engine_knows_no_grpc(path: Path) -> None:
    """The engine imports torch, the tokenizer and checkpoint libraries, and the standard library."""
    tops = {module.split(".")[0] for module in imports(path)}
    assert tops - sys.stdlib_module_names - {"llama2_server"} <= ENGINE_LIBRARIES


@pytest.mark.parametrize("path", sorted((ROOT / "client").rglob("*.py")), ids=str)
def test_client_knows_the_stubs_only(path: Path) -> None:
    """The client and the server meet only in the tests; the client never needs torch."""
    tops = {module.split(".")[0] for module in imports(path)}
    assert not tops & {"llama2_server", "torch", "transformers"}


def test_every_server_part_has_a_rule() -> None:
    """A new module has to say here what it may import."""
    assert {part_of(path) for path in (ROOT / "server").rglob("*.py")} <= set(ALLOWED)
