"""Adversarially train a timm backbone on an image-classification dataset, evaluate it per class, save and push it.

Without arguments it runs recipes/digits/ham.yaml: real data, offline, one to two minutes on a CPU.

    accelerate launch recipes/train_ham.py
    accelerate launch recipes/train_ham.py --config recipes/cifar10/preactresnet18_ham.yaml \
        --push_to_hub --hub_model_id me/robust-cifar10
    accelerate launch recipes/train_ham.py --help
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ham_hf.config import TrainConfig, parse_train_config
from ham_hf.faults import FaultError, clean_exit, explain_faults, explain_interrupt
from ham_hf.hub_requests import limit_waiting
from ham_hf.recipe_files import find_recipe
from ham_hf.terminal import hide_progress_bars
from ham_hf.training.launch import launched_processes, set_up_logging
from ham_hf.training.run_folder import RunLock
from ham_hf.training.stopping import StopRequests, stop_requests
from ham_hf.training.trackers import end_training
from ham_hf.training_run import begin, check_settings, evaluate, fit, prepare, push, write_results


def main(argv: Sequence[str] | None = None) -> None:
    """Run one training from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    limit_waiting()
    config = parse_train_config(argv, default_recipe=find_recipe("digits/ham"))
    if config.training.disable_tqdm:
        hide_progress_bars()
    folder = Path(config.training.output_dir)
    with (
        stop_requests(folder, config.training.max_train_hours) as stop,
        RunLock(folder) as lock,
        explain_interrupt(folder),
    ):
        train(config, stop, lock)


def train(config: TrainConfig, stop: StopRequests, lock: RunLock) -> None:
    """Run one training; ``lock`` is acquired here, on the main process."""
    with clean_exit(ValueError, OSError, FaultError), explain_faults(num_processes=launched_processes()):
        check_settings(config)
        run = prepare(config, lock)
        begin(run)
    trained = fit(run, stop)
    results = evaluate(run)
    if run.accelerator.is_main_process:
        write_results(run, trained, results)
    is_main_process = run.accelerator.is_main_process
    # Before the push: a failed one ends the process, and no other process has to wait for one that takes long.
    end_training(run.accelerator)
    if is_main_process and config.hub.push_to_hub:
        push(run)
