"""Which environment variables the sources of a package read or set, found in its syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

READERS = ("parse_flag_from_env", "parse_choice_from_env", "get_int_from_env", "getenv")
"""Functions whose first argument names a variable, or several."""
DICTIONARIES = ("environ", "current_env", "environment", "worker_env")
"""Names of dictionaries of variables."""


def variables_of(folder: Path, *, besides: tuple[str, ...] = ()) -> tuple[set[str], set[str]]:
    """Names of variables that the sources below ``folder`` name, and the places where a name could not be read."""
    names: set[str] = set()
    unread: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if path.relative_to(folder).parts[0] in besides:
            continue
        for scope, node in _keys(ast.parse(path.read_text(encoding="utf-8"))):
            found = _values(node, scope)
            if found is None:
                unread.add(f"{path.relative_to(folder)}: {ast.unparse(node)}")
            else:
                names |= found
    return names, unread


def _keys(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Every expression that names a variable, with the function (or module) that it is in."""
    scopes: dict[ast.AST, ast.AST] = {}
    for scope in ast.walk(tree):  # outer functions come first, so that the innermost one stays
        if isinstance(scope, ast.FunctionDef | ast.Module):
            scopes |= dict.fromkeys(ast.walk(scope), scope)
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_dictionary(node.value):
            yield scopes[node], node.slice
        elif isinstance(node, ast.Compare) and _is_dictionary(node.comparators[0]):
            if isinstance(node.ops[0], ast.In | ast.NotIn):
                yield scopes[node], node.left
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(_is_dictionary(target) for target in targets):
                yield from ((scopes[node], key) for key in node.value.keys if key is not None)
        elif isinstance(node, ast.Call) and _reads(node.func) and node.args:
            yield scopes[node], node.args[0]


def _is_dictionary(node: ast.expr) -> bool:
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)) in DICTIONARIES


def _reads(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in READERS
    if not isinstance(function, ast.Attribute):
        return False
    of_dictionary = function.attr in ("get", "pop", "setdefault") and _is_dictionary(function.value)
    return of_dictionary or function.attr in READERS


def _values(node: ast.expr, scope: ast.AST) -> set[str] | None:
    """Texts that an expression can be: constants, lists of them, and prefixes that the function assigns."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.List):
        parts = [_values(item, scope) for item in node.elts]
        return None if None in parts else set().union(*parts)
    if isinstance(node, ast.Name):
        assigned = [
            found.value
            for found in ast.walk(scope)
            if isinstance(found, ast.Assign)
            and any(getattr(target, "id", None) == node.id for target in found.targets)
        ]
        texts = {value.value for value in assigned if isinstance(value, ast.Constant)}
        return texts if assigned and len(texts) == len(assigned) else None
    if isinstance(node, ast.BinOp):
        left, right = _values(node.left, scope), _values(node.right, scope)
        return None if left is None or right is None else {one + two for one in left for two in right}
    return None
