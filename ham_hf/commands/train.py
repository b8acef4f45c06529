"""Adversarially train a timm backbone on an image-classification dataset, evaluate it per class, save and push it.

Without arguments it runs recipes/digits/ham.yaml: real data, offline, one to two minutes on a CPU.

    accelerate launch recipes/train_ham.py
    accelerate launch recipes/train_ham.py --config recipes/cifar10/preactresnet18_ham.yaml \
        --push_to_hub --hub_model_id me/robust-cifar10
    accelerate launch recipes/train_ham.py --help
"""

from __future__ import annotations

from collections.abc import Sequence

from ham_hf.config.command_line import parse_train_config
from ham_hf.invocation import find_recipe
from ham_hf.terminal import set_up_logging
from ham_hf.training.environment import process_rank


def main(argv: Sequence[str] | None = None) -> None:
    """Run one training from the command line ``argv`` (None: the process's)."""
    set_up_logging(process_rank())
    config = parse_train_config(argv, default_recipe=find_recipe("digits/ham"))
    # Only now: torch and timm take seconds to import, and --help needs none of them.
    from ham_hf.training_run import run_training

    run_training(config)
