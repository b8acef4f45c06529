"""Measure robustness per class of any model on any dataset: a Hub id, a local folder or a timm name.

    python recipes/evaluate.py outputs/digits-ham --dataset_name digits
    accelerate launch recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --autoattack
    python recipes/evaluate.py --help

Writes report.json, predictions.parquet (every image: prediction and margin clean and under each attack, and the
verdict), figures/ and EVALUATION.md (the evaluation part of a model card). Killed in the middle, the same command goes
on where it stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

from ham_hf.config import EvaluateConfig, parse_evaluate_config
from ham_hf.data import load_test_data
from ham_hf.data.decoding import CorruptImageError
from ham_hf.evaluation import NonFiniteLogitsError
from ham_hf.evaluation.autoattack import require_autoattack
from ham_hf.evaluation.corruptions import chosen_corruptions
from ham_hf.evaluation.foreign import ForeignAttackError, load_foreign_attack
from ham_hf.evaluation.partial_results import remove_partial_results
from ham_hf.evaluation.suite import evaluate_corrupted, evaluate_on_test
from ham_hf.faults import FaultError, MemoryExhaustedError, clean_exit, explain_faults, explain_out_of_memory
from ham_hf.fitting import align_classes, threat_model_of, what_trained
from ham_hf.hub import limit_waiting
from ham_hf.models import load_pixel_model
from ham_hf.reporting.breakdown_tables import breakdown_tables
from ham_hf.reporting.class_examples import class_examples, example_strip
from ham_hf.reporting.report import results_table, text_table
from ham_hf.reporting.results import evaluation_report, write_evaluation
from ham_hf.terminal import hide_progress_bars, show
from ham_hf.training.launch import create_accelerator, launched_processes, set_up_logging
from ham_hf.training.run_folder import OWNED_BY_EVALUATION, RunLock, check_evaluation_dir, clear_output_dir

logger = logging.getLogger("ham_hf.evaluate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one evaluation from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    limit_waiting()
    config = parse_evaluate_config(argv)
    if config.disable_tqdm:
        hide_progress_bars()
    try:
        with RunLock(config.output_path) as lock:
            evaluate(config, lock)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
        raise SystemExit(130) from None


def evaluate(config: EvaluateConfig, lock: RunLock) -> None:
    """Run one evaluation; ``lock`` is acquired here, on the main process."""
    with clean_exit(ValueError):
        world = launched_processes()
    with clean_exit(ValueError, OSError, FaultError), explain_faults(num_processes=world, way_on="the same command"):
        if config.evaluation.autoattack:
            require_autoattack()
        check_evaluation_dir(config.output_path, overwrite=config.overwrite_output_dir)
        accelerator = create_accelerator(use_cpu=config.use_cpu, ddp_timeout=config.ddp_timeout)
        foreign = [load_foreign_attack(place) for place in config.more.foreign_attack]
        loaded = load_pixel_model(config.model, revision=config.model_revision)
        chosen_corruptions(config.more.corruptions, num_channels=loaded.preprocessing.in_chans)
        threat_model = threat_model_of(config.attack, loaded, eval_step_size=config.evaluation.eval_step_size)
        with accelerator.main_process_first():
            data = load_test_data(
                config.data, loaded.preprocessing, what_trained(loaded), group_column=config.more.group_column
            )
        model, class_order = align_classes(loaded, data.class_names)
        if accelerator.is_main_process:
            lock.acquire()
            clear_output_dir(config.output_path, OWNED_BY_EVALUATION)
        accelerator.wait_for_everyone()
    logger.info("evaluating %s on %d images of %s", config.model, len(data.test), data.name)

    way_out = (
        "fewer images at once were tried: lower --per_device_eval_batch_size all the same, or use a device with more "
        "memory (--use_cpu takes the CPU's)"
    )
    faults = (
        NonFiniteLogitsError,
        MemoryExhaustedError,
        CorruptImageError,
        FaultError,
        ForeignAttackError,
        OSError,
    )
    with (
        clean_exit(*faults),
        explain_faults(num_processes=world, way_on="the same command"),
        explain_out_of_memory(way_out),
    ):
        results = evaluate_on_test(
            model.to(accelerator.device).to(memory_format=torch.channels_last),
            data,
            config.evaluation,
            threat_model=threat_model,
            accelerator=accelerator,
            seed=config.seed,
            output_dir=config.output_path,
            foreign=foreign,
            show_progress=not config.disable_tqdm,
        )
        corrupted = evaluate_corrupted(
            model,
            data,
            config.more,
            accelerator=accelerator,
            batch_size=config.evaluation.per_device_eval_batch_size,
            seed=config.seed,
            output_dir=config.output_path,
            show_progress=not config.disable_tqdm,
        )

    if accelerator.is_main_process:
        report = evaluation_report(
            config,
            loaded,
            data,
            results,
            accelerator,
            threat_model=threat_model,
            class_order=class_order,
            corrupted=corrupted,
        )
        with clean_exit(CorruptImageError, OSError):
            examples = example_strip(model, data.test, config.evaluation, threat_model=threat_model, seed=config.seed)
            of_classes = class_examples(
                model, data.test, config.evaluation, results, threat_model=threat_model, seed=config.seed
            )
            write_evaluation(
                report,
                config.output_path,
                results=results,
                examples=examples,
                of_classes=of_classes,
                groups=data.groups,
            )
        remove_partial_results(config.output_path)
        tables = [results_table(report), *breakdown_tables(report)]
        show("\n\n".join(map(text_table, tables)) + f"\n\neverything is in {config.output_path}\n")
    accelerator.end_training()
