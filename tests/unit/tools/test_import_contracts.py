"""The import contract that lists the libraries of the engine."""

import grimp
import pytest
from tools.checks.import_contracts import AllowedLibraries

ENGINE = "llama2_server.engine"


def disallowed(*imports: tuple[str, str]) -> list[str]:
    """Return the disallowed imports of a graph with these imports, if torch is the only allowed library."""
    graph = grimp.ImportGraph()
    for module in (ENGINE, f"{ENGINE}.model", "llama2_server.api"):
        graph.add_module(module)
    for importer, imported in imports:
        if imported not in graph.modules:
            graph.add_module(imported, is_squashed=True)
        graph.add_import(importer=importer, imported=imported)
    contract = AllowedLibraries(
        name="libraries",
        session_options={"root_packages": ["llama2_server"]},
        contract_options={"source_modules": [ENGINE], "allowed_libraries": ["torch"]},
    )
    check = contract.check(graph, verbose=False)
    found: list[str] = check.metadata["disallowed"]
    assert check.kept == (not found)
    return found


@pytest.mark.parametrize("imported", ["torch", "json", "llama2_server.configuration_error"])
def test_listed_libraries_are_allowed(imported: str) -> None:
    """Listed libraries, the standard library and this repository's packages are allowed."""
    assert disallowed((ENGINE, imported), (f"{ENGINE}.model", imported)) == []


def test_other_libraries_are_not_allowed() -> None:
    """An import anywhere in the package breaks the contract; imports of other packages do not."""
    imports = [(f"{ENGINE}.model", "numpy"), (ENGINE, "grpc"), ("llama2_server.api", "pydantic")]
    assert disallowed(*imports) == [f"{ENGINE} -> grpc", f"{ENGINE}.model -> numpy"]
