"""Size and shape of the package and its tests, measured from the source: ``make house``; test_house.py has the limits.

What is counted is our choice. Lines are physical lines. A *single importer* is a module that exactly one other module
imports; methods (also FAWA and AWP, a paper each), class rules and commands, which users call, are made to be so and
do not count. A *pair* of clones is two places that share six or more lines of code in a row, indentation apart;
imports, docstrings, comments and lines without a letter do not count.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES_OF_A_FUNCTION = 70
MAX_PARAMETERS, MAX_WITH_OPTIONS = 8, 12
"""Parameters of a function; of one whose options are keywords, such as `pgd`."""
CLONE_LINES = 6
PLUGINS = ("ham_hf.methods.", "ham_hf.commands", "ham_hf.training.averaging", "ham_hf.training.weight_perturbation")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class House:
    """What `measure` found; names are ``module:function`` or dotted modules."""

    lines: dict[str, int]
    single_importers: dict[str, str]
    long_functions: dict[str, int]
    long_signatures: dict[str, int]
    clones: list[tuple[str, str]]


def measure(root: Path = ROOT, package: str = "ham_hf") -> House:
    """Measure the package below ``root``."""
    paths = {_dotted(path.relative_to(root)): path for path in sorted((root / package).rglob("*.py"))}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    functions = {
        f"{name}:{node.name}": node
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    length = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions.items()}
    parameters = {name: _parameters(node) for name, node in functions.items()}
    return House(
        lines={name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in paths.items()},
        single_importers=_single_importers(trees),
        long_functions={name: count for name, count in length.items() if count > MAX_LINES_OF_A_FUNCTION},
        long_signatures={
            name: count
            for name, (count, options) in parameters.items()
            if count > (MAX_WITH_OPTIONS if options else MAX_PARAMETERS)
        },
        clones=_clones(paths, trees),
    )


def lines_of_tests(root: Path = ROOT) -> int:
    """Lines of everything below ``tests`` but the benchmarks."""
    paths = {*(root / "tests").rglob("*.py")} - {*(root / "tests/benchmarks").rglob("*.py")}
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _parameters(node: Function) -> tuple[int, bool]:
    """Number of parameters besides ``self``, and whether some of them are keywords with a default."""
    options = node.args
    names = [argument.arg for argument in (*options.posonlyargs, *options.args, *options.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]), any(options.kw_defaults)


def _imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            yield from parts
            if node.module in modules and len(parts) < len(node.names):
                yield node.module


def _single_importers(trees: dict[str, ast.Module]) -> dict[str, str]:
    importers: dict[str, set[str]] = defaultdict(set)
    for name, tree in trees.items():
        for module in _imported(tree, set(trees)):
            if module != name:
                importers[module].add(name)
    return {
        name: next(iter(found))
        for name, found in sorted(importers.items())
        if len(found) == 1 and not name.startswith(PLUGINS)
    }


def _code(path: Path, tree: ast.Module) -> list[tuple[int, str]]:
    """Line numbers and stripped lines of code, without what does not count."""
    passed_over: set[int] = set()
    for node in ast.walk(tree):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            passed_over.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [
        (number, line.strip())
        for number, line in lines
        if number not in passed_over and not line.strip().startswith("#") and any(map(str.isalpha, line))
    ]


def _clones(paths: dict[str, Path], trees: dict[str, ast.Module]) -> list[tuple[str, str]]:
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    code = {name: _code(path, trees[name]) for name, path in paths.items()}
    for name, lines in code.items():
        for index in range(len(lines) - CLONE_LINES + 1):
            places[tuple(line for _, line in lines[index : index + CLONE_LINES])].append((name, index))
    shared = {pair for found in places.values() for pair in itertools.combinations(found, 2)}
    # The first window of a run stands for all of it.
    starts = [((one, i), (two, j)) for (one, i), (two, j) in shared if ((one, i - 1), (two, j - 1)) not in shared]
    return sorted((f"{one}:{code[one][i][0]}", f"{two}:{code[two][j][0]}") for (one, i), (two, j) in starts)


def _room(name: str) -> str:
    room = ".".join(name.split(".")[:2])
    return room if (ROOT / room.replace(".", "/")).is_dir() else name.split(".")[0]


def main() -> int:
    """Print the figures."""
    house = measure()
    rooms: dict[str, int] = defaultdict(int)
    for name, count in house.lines.items():
        rooms[_room(name)] += count
    print(f"{sum(house.lines.values())} lines in {len(house.lines)} modules")
    for room, count in sorted(rooms.items(), key=lambda entry: -entry[1]):
        print(f"  {count:6} {room}")
    print(f"{lines_of_tests()} lines of tests without the benchmarks")
    for title, found in (
        ("modules with a single importer", list(house.single_importers.items())),
        (f"functions of more than {MAX_LINES_OF_A_FUNCTION} lines", list(house.long_functions.items())),
        (
            f"signatures of more than {MAX_PARAMETERS}, {MAX_WITH_OPTIONS} with keywords",
            list(house.long_signatures.items()),
        ),
        (f"pairs of places that share {CLONE_LINES} lines of code", house.clones),
    ):
        print(f"{len(found)} {title}")
        for name, other in found:
            print(f"  {name}  {other}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
