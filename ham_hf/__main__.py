"""The command ``ham-hf``, also as ``python -m ham_hf`` and ``accelerate launch -m ham_hf``.

Only the module of the command that is called is imported: the overview costs no import of torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ham_hf.commands import COMMANDS
from ham_hf.terminal import show


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first of the words ``argv`` (None: the process's) names, with the others.

    Raises:
        SystemExit: status 2 if the first word names no command; and exceptions of the command.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        importlib.import_module(COMMANDS[words[0]].module).main(words[1:])
    elif words and words[0] in ("-h", "--help", "help"):
        show(overview())
    elif words and words[0] == "--version":
        show(f"ham-hf {importlib.import_module('ham_hf').__version__}\n")
    elif words:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        sys.stderr.write(f"ham-hf: error: {words[0]!r}: expected one of {', '.join(COMMANDS)}{meant}\n")
        raise SystemExit(2)
    else:
        sys.stderr.write(overview())
        raise SystemExit(2)


def overview() -> str:
    """Text of ``ham-hf --help``."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""\
usage: ham-hf COMMAND ...

Fair adversarial training (HAM) for any timm backbone, with robustness per class in the model card.

{listed}

ham-hf train                              trains on real digits: offline, one to two minutes on a CPU
ham-hf train --config cifar10/preactresnet18_ham
ham-hf COMMAND --help                     the options that are used most; --help all shows every one
accelerate launch -m ham_hf train ...     the same on several devices
"""


if __name__ == "__main__":
    main()
