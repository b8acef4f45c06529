"""Measure robustness per class of any model on any dataset: a Hub id, a local folder or a timm name.

    python recipes/evaluate.py outputs/digits-ham --dataset_name digits
    accelerate launch recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --autoattack
    python recipes/evaluate.py --help

Writes report.json, predictions.parquet (every image: prediction and margin clean and under each attack, and the
verdict), figures/ and EVALUATION.md (the evaluation part of a model card). Killed in the middle, the same command goes
on where it stopped.
"""

from __future__ import annotations

from ham_hf.commands.evaluate import main

if __name__ == "__main__":
    main()
