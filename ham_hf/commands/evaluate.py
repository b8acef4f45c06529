"""Measure robustness per class of any model on any dataset: a Hub id, a local folder or a timm name.

    python recipes/evaluate.py outputs/digits-ham --dataset_name digits
    accelerate launch recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --autoattack
    python recipes/evaluate.py you/their-model --dataset_name uoft-cs/cifar10 --push_to_hub --create_pr
    python recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --corruptions all --group_column site
    python recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --foreign_attack my_attack.py:attack
    python recipes/evaluate.py --help

Writes report.json, predictions.parquet (every image: prediction and margin clean and under each attack, and the
verdict), figures/, EVALUATION.md (the evaluation part of a model card) and, of a dataset on the Hub, .eval_results/.
--push_to_hub brings them into the model's repository, --create_pr as a pull request. After an interruption, the same
command resumes where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from ham_hf.config.command_line import parse_evaluate_config
from ham_hf.terminal import set_up_logging
from ham_hf.training.environment import process_rank


def main(argv: Sequence[str] | None = None) -> None:
    """Run one evaluation from the command line ``argv`` (None: the process's)."""
    set_up_logging(process_rank())
    config = parse_evaluate_config(argv)
    # Only now: torch and timm take seconds to import, and --help needs none of them.
    from ham_hf.evaluation_run import evaluate, in_its_folder

    in_its_folder(config, evaluate)
