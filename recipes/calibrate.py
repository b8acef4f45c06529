"""Make a robust model fairer in minutes, without training: one number per class, found on held-out images.

    python recipes/calibrate.py outputs/digits-ham --fairness 0.5

`--help` shows the options; docs/evaluation.md explains them.
"""

from __future__ import annotations

from ham_hf.commands.calibrate import main

if __name__ == "__main__":
    main()
