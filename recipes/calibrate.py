"""Make a robust model fairer in minutes, without training: one number per class, found on held-out images.

    python recipes/calibrate.py outputs/digits-ham --fairness 0.5
    accelerate launch recipes/calibrate.py me/robust-cifar10 --max_average_drop 0.015
    python recipes/calibrate.py OWNER/NAME --dataset_name uoft-cs/cifar10 --calibration_split SPLIT --fairness 0.5
    python recipes/calibrate.py --help

Writes a model of the same architecture for plain timm, report.json, figures/, and a card that says what was given for
what.
Killed in the middle, the same command goes on where it stopped.
"""

from __future__ import annotations

from ham_hf.commands.calibrate import main

if __name__ == "__main__":
    main()
