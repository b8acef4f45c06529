"""The examples of docs/examples run as they are, on few images."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.recipe_runs import finish

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
ROOT = EXAMPLES.parents[1]


def run(folder: Path, *command: str | Path) -> str:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    return finish([sys.executable, *map(str, command)], environment, cwd=folder).stdout


@pytest.mark.parametrize("name", ["own_loop", "transformers_trainer", "lightning_module"])
def test_script(name: str, tmp_path: Path) -> None:
    needed = {"transformers_trainer": "transformers", "lightning_module": "lightning"}.get(name)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: {name}.py was not run")
    # Three epochs: two of warm-up, one that mines.
    out = run(tmp_path, EXAMPLES / f"{name}.py", "--epochs", "3", "--images", "200")
    assert "40 images, 10 classes, linf 0.1;" in out
    assert "Verdict" in out


def test_notebook(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells), "no outputs in the repository"
    # As a notebook does: cell by cell in one namespace, the last expression shown.
    script = f"""
import ast

names = {{}}
for source in {code!r}:
    source = source.replace("EPOCHS, IMAGES = 10, 1797", "EPOCHS, IMAGES = 1, 200")
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        print(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
"""
    (tmp_path / "cells.py").write_text(script)
    out = run(tmp_path, tmp_path / "cells.py")
    assert out.count("40 images, 10 classes, linf 0.1;") == 2
    assert (tmp_path / "outputs" / "notebook" / "model.safetensors").is_file()
