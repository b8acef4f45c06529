"""Measure robustness per class of any model on any dataset: a Hub id, a local folder or a timm name.

    python recipes/evaluate.py outputs/digits-ham --dataset_name digits
    accelerate launch recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --autoattack
    python recipes/evaluate.py you/their-model --dataset_name uoft-cs/cifar10 --push_to_hub --create_pr
    python recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --corruptions all --group_column site
    python recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --foreign_attack my_attack.py:attack
    python recipes/evaluate.py --help

Writes report.json, predictions.parquet (every image: prediction and margin clean and under each attack, and the
verdict), figures/, EVALUATION.md (the evaluation part of a model card) and, of a dataset on the Hub, .eval_results/.
--push_to_hub brings them into the model's repository, --create_pr as a pull request. Killed in the middle, the same
command goes on where it stopped.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

from accelerate import Accelerator
from torch import nn

from ham_hf.attacks import ThreatModel
from ham_hf.config import EvaluateConfig, config_to_dict, parse_evaluate_config
from ham_hf.config.yaml_text import setting_words
from ham_hf.data import TestData
from ham_hf.data.decoding import CorruptImageError
from ham_hf.data.provenance import plain_name
from ham_hf.evaluation import AttackResult, NonFiniteLogitsError
from ham_hf.evaluation.autoattack import require_autoattack
from ham_hf.evaluation.corruption_accuracy import CorruptionResult
from ham_hf.evaluation.corruptions import chosen_corruptions
from ham_hf.evaluation.foreign import ForeignAttack, ForeignAttackError, load_foreign_attacks
from ham_hf.evaluation.partial_results import remove_partial_results
from ham_hf.faults import FaultError, MemoryExhaustedError, clean_exit, explain_faults, explain_out_of_memory
from ham_hf.hub import PushError, check_pull_request, check_write_access, limit_waiting, push_evaluation
from ham_hf.invocation import command
from ham_hf.models import load_pixel_model
from ham_hf.reporting.breakdown_tables import breakdown_tables
from ham_hf.reporting.report import results_table, text_table
from ham_hf.reporting.results import evaluation_report, write_evaluation
from ham_hf.runs import (
    align_classes,
    class_examples,
    evaluate_corrupted,
    evaluate_on_test,
    example_strip,
    load_evaluation_data,
    threat_model_of,
)
from ham_hf.terminal import hide_progress_bars, show
from ham_hf.training.launch import create_accelerator, launched_processes, set_up_logging
from ham_hf.training.run_folder import OWNED_BY_EVALUATION, RunLock, check_evaluation_dir, clear_output_dir

NOT_THE_NUMBERS = frozenset(
    {"model", "output_dir", "overwrite_output_dir", "disable_tqdm", "ddp_timeout", "push_to_hub", "create_pr",
     "hub_model_id", "publish_images", "dataloader_num_workers"}
)  # fmt: skip
"""Settings that change nothing of what is measured."""

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
        if config.hub.push_to_hub and accelerator.is_main_process:
            check_push(config)
        foreign = load_foreign_attacks(config.more.foreign_attack)
        loaded = load_pixel_model(config.model, revision=config.model_revision)
        chosen_corruptions(config.more.corruptions, num_channels=loaded.preprocessing.in_chans)
        threat_model = threat_model_of(config.attack, loaded, eval_step_size=config.evaluation.eval_step_size)
        with accelerator.main_process_first():
            data = load_evaluation_data(config.data, loaded, group_column=config.more.group_column)
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
    faults = (NonFiniteLogitsError, MemoryExhaustedError, CorruptImageError, FaultError, ForeignAttackError, OSError)
    with (
        clean_exit(*faults),
        explain_faults(num_processes=world, way_on="the same command"),
        explain_out_of_memory(way_out),
    ):
        results, corrupted = _measure(config, model, data, foreign, threat_model=threat_model, accelerator=accelerator)

    if accelerator.is_main_process:
        report = evaluation_report(
            config.model,
            loaded,
            data,
            results,
            config=config_to_dict(config),
            threat_model=threat_model,
            accelerator=accelerator,
            seed=config.seed,
            class_order=class_order,
            corrupted=corrupted,
        )
        with clean_exit(CorruptImageError, OSError):
            examples = example_strip(
                model, data.test, config.evaluation, results, threat_model=threat_model, seed=config.seed
            )
            of_classes = class_examples(
                model, data.test, config.evaluation, results, threat_model=threat_model, seed=config.seed
            )
            write_evaluation(
                report,
                config.output_path,
                results=results,
                examples=examples,
                command=shell_command(config),
                of_classes=of_classes,
                groups=data.groups,
            )
        remove_partial_results(config.output_path)
        tables = [results_table(report), *breakdown_tables(report)]
        show("\n\n".join(map(text_table, tables)) + f"\n\neverything is in {config.output_path}\n")
    is_main_process = accelerator.is_main_process
    accelerator.end_training()
    if is_main_process and config.hub.push_to_hub:
        with clean_exit(PushError):
            url = push_evaluation(
                config.output_path,
                str(config.repo_id),
                create_pr=config.hub.create_pr,
                publish_images=config.hub.publish_images,
            )
        show(f"pushed to {url}\n")


def check_push(config: EvaluateConfig) -> None:
    """Refuse a push that could not work, before anything is computed.

    Raises:
        ValueError: saying what to fix.
    """
    if config.hub.create_pr:
        check_pull_request(str(config.repo_id))
    else:
        check_write_access(config.repo_id, private=False)


def shell_command(config: EvaluateConfig) -> str:
    """The words that measure the same again, without where things lie on this machine."""
    settings = config_to_dict(config)
    defaults = config_to_dict(EvaluateConfig(model=config.model))
    given: dict[str, object] = {"dataset_name": plain_name(config.data.dataset_name)}
    for name, value in settings.items():
        if name not in NOT_THE_NUMBERS and value != defaults[name]:
            given.setdefault(name, value)
    return shlex.join([*command("evaluate").split(), plain_name(config.model), *setting_words(given)])


def _measure(
    config: EvaluateConfig,
    model: nn.Module,
    data: TestData,
    foreign: Sequence[ForeignAttack],
    *,
    threat_model: ThreatModel,
    accelerator: Accelerator,
) -> tuple[dict[str, AttackResult], list[CorruptionResult]]:
    """What all attacks, and the corruptions asked for, leave of the test images."""
    results = evaluate_on_test(
        model,
        data.test,
        config.evaluation,
        num_classes=len(data.class_names),
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
    return results, corrupted
