"""Compare training methods: run methods x seeds through train_ham.py, or take runs that exist, and write one table.

    python recipes/compare.py --config recipes/digits/compare.yaml
    python recipes/compare.py outputs/a outputs/b me/robust-cifar10 --output_dir outputs/compared
    python recipes/compare.py --help

Writes comparison.md, comparison.csv, comparison.json, comparison_tradeoff.png and comparison_per_class.png. Called
again after an interruption, it goes on where it was: finished runs stay, unfinished ones resume from their checkpoint.
"""

from __future__ import annotations

from ham_hf.commands.compare import main

if __name__ == "__main__":
    main()
