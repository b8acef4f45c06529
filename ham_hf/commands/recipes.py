"""List the recipes that come with the package.

    ham-hf recipes

The names go after --config: ham-hf train --config NAME, ham-hf compare --config NAME. Copy a file to change more of it
than flags do; the first line of the list says where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from ham_hf.invocation import command, command_parser, list_recipes, recipes_folder
from ham_hf.terminal import replace_what_cannot_be_shown, show


def main(argv: Sequence[str] | None = None) -> None:
    """List them; ``argv`` holds no words but ``--help`` (None: the process's)."""
    replace_what_cannot_be_shown()
    command_parser("recipes", __doc__, allow_abbrev=True).parse_args(argv)
    found = list(list_recipes())
    titles = {
        "train": f"{command('train')} --config NAME",
        "compare": f"{command('compare')} --config NAME",
        "launch": "accelerate launch --config_file FILE ..., with the folder above before FILE",
    }
    width = max(len(recipe.name) for recipe in found) + len(".yaml")
    lines = [f"in {recipes_folder()}"]
    for use, title in titles.items():
        lines += ["", title]
        for recipe in found:
            if recipe.use == use:
                name = f"{recipe.name}.yaml" if use == "launch" else recipe.name
                lines.append(f"  {name:{width}}  {recipe.summary}")
    show("\n".join(lines) + "\n")
