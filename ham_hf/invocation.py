"""How this process was started and what its installation holds, so that messages name commands and files that exist.

The commands run in two ways: as files of a checkout (``accelerate launch recipes/train_ham.py``), or by their names
once the package is installed (``ham-hf train``, ``python -m ham_hf train``). The recipes, YAML files of settings,
comparisons and launch configurations, are in ``recipes`` beside the package, and in ``ham_hf/recipes`` of a wheel.
Loads no other module.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

SCRIPTS = {
    "train": "train_ham.py",
    "evaluate": "evaluate.py",
    "compare": "compare.py",
    "calibrate": "calibrate.py",
    "push": "push.py",
}
"""The commands that are files of ``recipes/`` too."""


def is_script() -> bool:
    """Whether this process runs a file of a checkout's ``recipes/``."""
    started = PurePath(sys.argv[0] if sys.argv else "")
    # A script that is called from its own folder has no folder in its name.
    return started.name in SCRIPTS.values() and started.parent.name in ("recipes", "")


def program(name: str) -> str:
    """The name of command ``name`` in usage lines: ``train_ham.py`` for a script, else ``ham-hf train``."""
    return SCRIPTS[name] if name in SCRIPTS and is_script() else f"ham-hf {name}"


def command(name: str) -> str:
    """The words that run command ``name``: ``python recipes/push.py`` beside a script, else ``ham-hf push``."""
    return f"python recipes/{SCRIPTS[name]}" if name in SCRIPTS and is_script() else f"ham-hf {name}"


def command_parser(name: str, doc: str | None, *, allow_abbrev: bool = False) -> argparse.ArgumentParser:
    """A parser for command ``name`` whose help begins with ``doc``, the docstring of its module."""
    return argparse.ArgumentParser(
        prog=program(name),
        description=(doc or "").replace(f"ham-hf {name}", command(name)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )


class RecipeFile(NamedTuple):
    """A file that comes with the package: its name for ``--config``, its first comment line, and its use."""

    name: str
    summary: str
    use: Literal["train", "compare", "launch"]
    path: Path


def recipes_folder() -> Path:
    """The folder with the recipes of this installation."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"


def find_recipe(written: str) -> Path:
    """The file that ``--config`` means: the path ``written``, which may not exist, or a recipe of `recipes_folder`.

    A recipe is named as ``cifar10/preactresnet18_ham``, with or without ``.yaml``; an existing file or folder of that
    path wins.
    """
    path = Path(written)
    if os.path.exists(written) or path.is_absolute() or ".." in path.parts:
        return path
    named = recipes_folder() / (written if written.endswith(".yaml") else f"{written}.yaml")
    return named if os.path.isfile(named) else path


def list_recipes() -> Iterator[RecipeFile]:
    """Every recipe, in the order of the names."""
    folder = recipes_folder()
    for path in sorted(folder.glob("*/*.yaml")):
        text = path.read_text(encoding="utf-8")
        use: Literal["train", "compare", "launch"] = "train"
        if path.parent.name == "accelerate":
            use = "launch"
        elif re.search(r"^runs:", text, re.MULTILINE):
            use = "compare"
        summary = re.sub(r"^#\s*(What:\s*)?", "", text.partition("\n")[0])
        yield RecipeFile(path.relative_to(folder).with_suffix("").as_posix(), summary, use, path)


def shown_path(name: str) -> str:
    """How a message names a file of `recipes_folder`: as in the checkout, or by the place that an installation has."""
    folder = recipes_folder()
    return str(folder / name) if folder.parent == Path(__file__).parent else f"recipes/{name}"
