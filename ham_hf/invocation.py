"""How this process was started, so that a message names a command that its reader has.

The commands run in two ways: as files of a checkout (``accelerate launch recipes/train_ham.py``), or by their names
once the package is installed (``ham-hf train``, ``python -m ham_hf train``). Loads no other module.
"""

from __future__ import annotations

import sys
from pathlib import PurePath

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
    """What usage lines call command ``name``: ``train_ham.py`` for a script, else ``ham-hf train``."""
    return SCRIPTS[name] if name in SCRIPTS and is_script() else f"ham-hf {name}"


def command(name: str) -> str:
    """The words that run command ``name``: ``python recipes/push.py`` beside a script, else ``ham-hf push``."""
    return f"python recipes/{SCRIPTS[name]}" if name in SCRIPTS and is_script() else f"ham-hf {name}"
