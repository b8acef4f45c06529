"""Measure robustness per class of any model on any dataset: a Hub id, a local folder or a timm name.

    python recipes/evaluate.py outputs/digits-ham --dataset_name digits

`--help` shows the options; docs/evaluation.md explains them.
"""

from __future__ import annotations

from ham_hf.commands.evaluate import main

if __name__ == "__main__":
    main()
