"""An import-linter contract: a package imports only the libraries on its list; see [tool.importlinter]."""

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class AllowedLibraries(Contract):
    """Modules of `source_modules` import only the standard library, `allowed_libraries` and this repository's packages.

    Type-only imports count. The other contracts restrict imports of the standard library and of this repository.
    """

    type_name = "allowed_libraries"
    source_modules = fields.ListField(subfield=fields.ModuleField())
    allowed_libraries = fields.SetField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Return the contract's result, with each disallowed import in its metadata."""
        own = {root.partition(".")[0] for root in self.session_options["root_packages"]}
        allowed = {*self.allowed_libraries, *sys.stdlib_module_names, *own}  # type: ignore[misc]
        disallowed = [
            f"{importer} -> {imported}"
            for source in self.source_modules  # type: ignore[attr-defined]
            for importer in sorted({source.name, *graph.find_descendants(source.name)})
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if imported.partition(".")[0] not in allowed
        ]
        return ContractCheck(kept=not disallowed, metadata={"disallowed": disallowed})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print each disallowed import."""
        for line in check.metadata["disallowed"]:
            output.print_error(f"{line}: the library is not on the list of allowed libraries")
