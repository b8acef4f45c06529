"""Compare training methods: run methods x seeds through train_ham.py, or take runs that exist, and write one table.

    python recipes/compare.py --config recipes/digits/compare.yaml
    python recipes/compare.py outputs/a outputs/b me/robust-cifar10 --output_dir outputs/compared
    python recipes/compare.py --help

Writes comparison.md, comparison.csv, comparison.json, comparison_tradeoff.png and comparison_per_class.png. Called
again after an interruption, it goes on where it was: finished runs stay, unfinished ones resume from their checkpoint.

Runs that exist are one row if their settings are equal but for the seed; a row is called LABEL if its runs lie in
LABEL/seedN, else by its method. The folder of an earlier comparison stands for all runs in it, with its order of rows
and its baseline.

Where runs kept their predictions (predictions.parquet), rows are set against the baseline image by image, and a number
is bold if it is better for sure; runs of earlier versions are shown, and it is said that they could not be tested.
"""

from __future__ import annotations

from ham_hf.commands.compare import main

if __name__ == "__main__":
    main()
