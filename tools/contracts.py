"""The import-linter contract that reads a module's role from its name."""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class PureContract(Contract):
    """Modules of `package.<service>` that play a role may not directly import what that role forbids.

    Options: `package`; `edges`, names that have other roles and are skipped; `only`, names to look at instead of all the
    rest; `forbidden`, packages that must not be imported; `chassis`, the only chassis modules that may be (if given). A
    module that is looked at may not import one of `edges` of its own service either: that would be a way around.
    """

    type_name = "pure"

    package = fields.StringField()
    edges = fields.SetField(subfield=fields.StringField(), required=False)
    only = fields.SetField(subfield=fields.StringField(), required=False)
    forbidden = fields.SetField(subfield=fields.StringField())
    chassis = fields.SetField(subfield=fields.StringField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Collects every direct import that the role forbids."""
        package, edges, only = str(self.package), set(self.edges or ()), set(self.only or ())
        forbidden, chassis = set(self.forbidden), set(self.chassis or ())
        broken: list[tuple[str, str]] = []
        for module in sorted(graph.modules):
            if not module.startswith(package + "."):
                continue
            parts = module.split(".")[2:]
            if not parts:
                continue
            if (only and not self._named(parts, only)) or self._named(parts, edges):
                continue
            for imported in sorted(graph.find_modules_directly_imported_by(module)):
                within = imported.split(".")
                if any(imported == name or imported.startswith(name + ".") for name in forbidden):
                    broken.append((module, imported))
                elif chassis and within[0] == "chassis" and not self._under(imported, chassis):
                    broken.append((module, imported))
                elif within[0] == package and self._named(within[2:], edges):
                    broken.append((module, imported))
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Prints one line per import."""
        for module, imported in check.metadata["broken"]:
            output.print_error(f"{module} may not import {imported}")

    @staticmethod
    def _named(parts: list[str], names: set[str]) -> bool:
        return any(part == name or part.startswith(name + "_") for part in parts for name in names)

    @staticmethod
    def _under(module: str, allowed: set[str]) -> bool:
        return any(module == name or module.startswith(name + ".") for name in allowed)
