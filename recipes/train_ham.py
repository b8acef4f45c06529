"""Adversarially train a timm backbone on an image-classification dataset, evaluate it per class, save and push it.

    accelerate launch recipes/train_ham.py

Without arguments it trains on the digits that come with the package. `--help` shows the options; README.md and docs/
explain them.
"""

from __future__ import annotations

from ham_hf.commands.train import main

if __name__ == "__main__":
    main()
