"""The commands of ``ham-hf``. ``COMMANDS`` lists them; each module has a ``main(argv)``."""

from __future__ import annotations

import sys
from typing import NamedTuple

from ham_hf.terminal import printable
from ham_hf.training.environment import AT_IMPORT, check_flags


class Command(NamedTuple):
    """A command: the module whose ``main`` runs it, imported when it is called, and one line on its purpose."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("ham_hf.commands.train", "train a timm backbone adversarially, evaluate it per class, save it"),
    "evaluate": Command("ham_hf.commands.evaluate", "measure robustness per class of any model on any dataset"),
    "compare": Command("ham_hf.commands.compare", "run methods x seeds, or take runs that exist, and write one table"),
    "calibrate": Command("ham_hf.commands.calibrate", "make a robust model fairer in minutes, without training"),
    "push": Command("ham_hf.commands.push", "push a finished run to the Hub, or repair an older export"),
    "page": Command("ham_hf.commands.page", "write report.html: which class fails, and why, for one run or several"),
    "recipes": Command("ham_hf.commands.recipes", "list the recipes that come with the package, for --config NAME"),
}
"""Every command of ``ham-hf``, by its name, in the order of the overview."""

try:
    check_flags(AT_IMPORT)  # before a command imports accelerate
except ValueError as error:
    sys.stderr.write(f"error: {printable(str(error))}\n")
    raise SystemExit(2) from None
