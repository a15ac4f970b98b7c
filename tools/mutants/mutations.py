"""Mutations of Python source: each changes one place as a mistake would."""

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Node = TypeVar("Node", bound=ast.AST)
MAX_NUMBER = 2
"""Larger numbers are sizes and times, whose neighbors behave alike."""
_PAIRS = ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = dict(_PAIRS) | {second: first for first, second in _PAIRS}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add}
_OPERATORS |= {ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add}
_NOT_MUTATED = ("annotation", "returns", "exc", "cause", "decorator_list")  # fields of nodes
_CHECKS = ("strict",)  # arguments that change nothing as long as the program is correct


@dataclass(frozen=True)
class Mutant:
    """A module with one mutation. `place` has the function and the position in it, not in the module."""

    path: Path
    lines: range
    """The lines of the mutated statement; of one with a body, those of its head."""
    place: str
    before: str
    after: str
    _parts: tuple[ast.Module, ast.AST, ast.AST]

    @property
    def source(self) -> str:
        """The whole mutated module."""
        tree, node, changed = self._parts

        class Replacing(ast.NodeTransformer):
            """Replaces one node."""

            def visit(self, visited: ast.AST) -> ast.AST:
                return changed if visited is node else self.generic_visit(visited)

        # The transformer changes the tree, so it works on a copy, which shares only these two nodes.
        shared = {id(node): node, id(changed): changed}
        return ast.unparse(ast.fix_missing_locations(Replacing().visit(copy.deepcopy(tree, shared))))

    @property
    def order(self) -> str:
        """A key that sorts mutants at random, always in the same way."""
        return hashlib.sha256(f"{self.path}:{self.place}:{self.before}:{self.after}".encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.path}:{self.lines.start}: {self.before} -> {self.after}"


def mutants(root: Path, path: Path) -> Iterator[Mutant]:
    """Yield all mutants of the functions of a module; `path` is relative to `root`."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    for function, nodes in _functions(tree):
        for number, (statement, node) in enumerate(nodes):
            for changed in _changed_statements(node) if isinstance(node, ast.stmt) else _changed_expressions(node):
                parts = (tree, node, changed)
                lines, place = _lines(statement), f"{function}.{number}"
                yield Mutant(path, lines, place, _text(node), _text(changed), parts)


def _functions(tree: ast.Module) -> Iterator[tuple[str, list[tuple[ast.stmt, ast.expr | ast.stmt]]]]:
    """Yield the functions of a module, with the nodes of their bodies; nested functions are part of the outer one."""
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while scopes:
        prefix, scope = scopes.pop()
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{node.name}", [found for one in node.body for found in _nodes(one, one)]


def _nodes(node: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.stmt, ast.expr | ast.stmt]]:
    """Yield the expressions and statements that may be mutated: not annotations, raised errors or calls of the log.

    Each comes after the statement that it belongs to.
    """
    if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or _text(node).startswith("logger.")):
        return
    if isinstance(node, ast.stmt):
        statement = node
    if isinstance(node, ast.expr | ast.stmt):
        yield statement, node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.keyword) and child.arg in _CHECKS:
                continue
            if isinstance(child, ast.AST) and name not in _NOT_MUTATED:
                yield from _nodes(child, statement)


def _lines(statement: ast.stmt) -> range:
    body = getattr(statement, "body", None)
    end = body[0].lineno if body else (statement.end_lineno or statement.lineno) + 1
    return range(statement.lineno, max(end, statement.lineno + 1))


def _changed_statements(node: ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp | ast.Constant):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield _with(node, value=ast.Constant(None))
        case ast.AugAssign(op=operator) if type(operator) in _OPERATORS:
            yield _with(node, op=_OPERATORS[type(operator)]())
            yield ast.Pass()
        case ast.Expr() | ast.Delete():
            yield ast.Pass()
        case ast.Break() | ast.Continue():
            yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()


def _changed_expressions(node: ast.expr) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            yield _with(node, ops=[_COMPARISONS[type(operator)]()])
        case ast.BinOp(op=operator) if type(operator) in _OPERATORS and not _is_text(node):
            yield _with(node, op=_OPERATORS[type(operator)]())
        case ast.BoolOp(op=operator):
            yield _with(node, op=ast.Or() if isinstance(operator, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield _with(node, value=not value)
        case ast.Constant(value=int() as value) if value <= MAX_NUMBER:
            yield _with(node, value=value + 1)


def _is_text(node: ast.BinOp) -> bool:
    """Return whether the operation is of text: another operator would be a TypeError, which tests always find."""
    constants = (one.value for one in ast.walk(node) if isinstance(one, ast.Constant))
    return any(isinstance(value, str) for value in constants)


def _with(node: Node, **fields: object) -> Node:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _text(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()[0]
    return text if len(text) <= 100 else text[:97] + "..."
