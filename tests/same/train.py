"""Train a list of runs, one after the other in one process, with the package and the recipe of one source tree.

    python train.py TREE RUNS FLAG   # a file with a JSON list of labels, each with its LABEL.yaml in this folder

It imports nothing of the tests, as it runs with the package of another commit. A run that the commit refuses
leaves the file ``LABEL-refused`` where the others leave their folder.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from contextlib import redirect_stderr
from pathlib import Path


def main() -> None:
    tree = Path(sys.argv[1])
    spec = importlib.util.spec_from_file_location("recipe", tree / "recipes" / "train_ham.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    package = Path(sys.modules["ham_hf"].__file__).parents[1]
    if package != tree:
        raise RuntimeError(f"the package comes from {package}, not from {tree}")
    for label in json.loads(Path(sys.argv[2]).read_text()):
        said = io.StringIO()
        try:
            # A relative path: that two commits train in different folders must not show.
            with redirect_stderr(said):
                recipe.main([f"--config={label}.yaml", f"--output_dir={label}", sys.argv[3]])
        except SystemExit as refusal:
            Path(f"{label}-refused").write_text(f"status {refusal}: {said.getvalue()[-1000:]}")


if __name__ == "__main__":
    main()
