"""One evaluation of an existing model: check, measure, write; and the parts that a calibration shares."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from ham_hf.artifacts import OWNED_BY_EVALUATION
from ham_hf.attacks import ThreatModel
from ham_hf.config import CalibrateConfig, EvaluateConfig, EvaluationConfig, config_to_dict
from ham_hf.config.yaml_file import setting_words
from ham_hf.data import TestData, load_test_data
from ham_hf.data.declarations import StreamError
from ham_hf.data.decoding import CorruptImageError
from ham_hf.data.provenance import plain_name
from ham_hf.evaluation import AttackResult, NonFiniteLogitsError, robustness, standard_attacks
from ham_hf.evaluation.autoattack import evaluate_autoattack, require_autoattack
from ham_hf.evaluation.batch_sharing import Workplace, remove_partial_results
from ham_hf.evaluation.corruption_accuracy import CorruptionResult, evaluate_corruptions
from ham_hf.evaluation.corruptions import chosen_corruptions
from ham_hf.evaluation.foreign import ForeignAttack, ForeignAttackError, load_foreign_attacks
from ham_hf.faults import FaultError, clean_exit, explain_faults, explain_interrupt, explain_out_of_memory
from ham_hf.fitting import align_classes, threat_model_of, what_trained
from ham_hf.hub import PushError, check_target, push_evaluation
from ham_hf.hub_requests import limit_waiting
from ham_hf.invocation import command
from ham_hf.models import LoadedModel, load_pixel_model
from ham_hf.reporting.class_examples import run_examples
from ham_hf.reporting.formats import public_value, text_table
from ham_hf.reporting.report import RunReport
from ham_hf.reporting.run_report import evaluation_report, write_evaluation
from ham_hf.reporting.tables import breakdown_tables, results_table
from ham_hf.terminal import hide_progress_bars, show
from ham_hf.training.launch import create_accelerator, launched_processes
from ham_hf.training.run_folder import RunLock, check_results_dir, clear_output_dir

logger = logging.getLogger("ham_hf.evaluate")


ConfigT = TypeVar("ConfigT", EvaluateConfig, CalibrateConfig)

RESUMED_BY = "the same command"
NOT_THE_NUMBERS = frozenset(
    {"model", "output_dir", "overwrite_output_dir", "disable_tqdm", "ddp_timeout", "push_to_hub", "create_pr",
     "hub_model_id", "publish_images", "dataloader_num_workers"}
)  # fmt: skip
"""Settings that do not change the results."""

FAULTS = (NonFiniteLogitsError, CorruptImageError, StreamError, FaultError, ForeignAttackError, OSError)
"""Faults whose messages say what to do."""


def in_its_folder(config: ConfigT, run: Callable[[ConfigT, RunLock], None]) -> None:
    """Run an evaluation or a calibration with the lock of its output folder, and say how to resume after Ctrl-C."""
    limit_waiting()
    if config.disable_tqdm:
        hide_progress_bars()
    with RunLock(config.output_path) as lock, explain_interrupt(f"{RESUMED_BY} resumes where it stopped"):
        run(config, lock)


def evaluate_on_test(
    model: nn.Module,
    data: TestData,
    config: EvaluationConfig,
    *,
    threat_model: ThreatModel,
    place: Workplace,
    foreign: Sequence[ForeignAttack] = (),
) -> dict[str, AttackResult]:
    """Clean, PGD, CW and foreign attacks on the whole test split; AutoAttack, if asked for, perhaps on a part.

    ``model`` is the unwrapped pixel model, on the device and in the memory layout of images.
    """
    results = robustness.evaluate(
        model,
        data.test,
        [
            *standard_attacks(config.attack(threat_model)),
            *(replace(attack, threat_model=threat_model) for attack in foreign),
        ],
        place,
    )
    if config.autoattack:
        results["autoattack"] = evaluate_autoattack(
            model,
            data.test,
            place,
            num_classes=len(data.class_names),
            threat_model=threat_model,
            num_examples=config.autoattack_examples,
        )
    return results


@dataclass(frozen=True, eq=False, kw_only=True)
class Job(Generic[ConfigT]):
    """A checked and loaded evaluation: ``model`` has its logits in the order of the classes of ``data``."""

    config: ConfigT
    accelerator: Accelerator
    loaded: LoadedModel
    model: nn.Module
    class_order: str
    data: TestData
    threat_model: ThreatModel

    @property
    def place(self) -> Workplace:
        """Where it runs."""
        return Workplace(
            accelerator=self.accelerator,
            batch_size=self.config.evaluation.per_device_eval_batch_size,
            seed=self.config.seed,
            output_dir=self.config.output_path,
            show_progress=not self.config.disable_tqdm,
        )

    def evaluate(self, model: nn.Module, foreign: Sequence[ForeignAttack] = ()) -> dict[str, AttackResult]:
        """Every attack on the test images, AutoAttack perhaps on a part of them, on a model with the same logits."""
        return evaluate_on_test(
            model.to(self.accelerator.device).to(memory_format=torch.channels_last),
            self.data,
            self.config.evaluation,
            threat_model=self.threat_model,
            place=self.place,
            foreign=foreign,
        )

    def report(self, results: Mapping[str, AttackResult], corrupted: Sequence[CorruptionResult] = ()) -> RunReport:
        """The report of the evaluation."""
        return evaluation_report(
            self.config,
            self.loaded,
            self.data,
            results,
            self.accelerator,
            threat_model=self.threat_model,
            class_order=self.class_order,
            corrupted=corrupted,
        )


def begin(config: EvaluateConfig | CalibrateConfig, owned: Sequence[str]) -> Accelerator:
    """Reject what can be rejected without model and data, and start the accelerator."""
    if config.evaluation.autoattack:
        require_autoattack()
    check_results_dir(config.output_path, owned, overwrite=config.overwrite_output_dir)
    return create_accelerator(use_cpu=config.use_cpu, ddp_timeout=config.ddp_timeout)


def make_job(
    config: ConfigT,
    accelerator: Accelerator,
    lock: RunLock,
    *,
    loaded: LoadedModel,
    data: TestData,
    threat_model: ThreatModel,
    owned: Sequence[str],
) -> Job[ConfigT]:
    """Match the classes, lock the output folder and remove ``owned`` files of an earlier run, on all processes."""
    model, class_order = align_classes(loaded, data.class_names)
    if accelerator.is_main_process:
        lock.acquire()
        clear_output_dir(config.output_path, owned)
    accelerator.wait_for_everyone()
    return Job(
        config=config,
        accelerator=accelerator,
        loaded=loaded,
        model=model,
        class_order=class_order,
        data=data,
        threat_model=threat_model,
    )


@contextmanager
def refusals(continue_with: str = RESUMED_BY) -> Iterator[None]:
    """End the process with a message for errors before the work begins."""
    with (
        clean_exit(ValueError, OSError, FaultError),
        explain_faults(num_processes=launched_processes(), continue_with=continue_with),
    ):
        yield


@contextmanager
def faults_of_work(memory_advice: str, continue_with: str = RESUMED_BY) -> Iterator[None]:
    """End the process with a message for faults during the work."""
    with (
        clean_exit(*FAULTS),
        explain_faults(num_processes=launched_processes(), continue_with=continue_with),
        explain_out_of_memory(memory_advice),
    ):
        yield


def evaluate(config: EvaluateConfig, lock: RunLock) -> None:
    """Run one evaluation; ``lock`` is acquired here, on the main process."""
    with refusals():
        job, foreign = _prepare(config, lock)
    logger.info("evaluating %s on %d images of %s", config.model, len(job.data.test), job.data.name)
    advice = (
        "fewer images at once were tried: lower --per_device_eval_batch_size all the same, or use a device with more "
        "memory (--use_cpu takes the CPU's)"
    )
    with faults_of_work(advice):
        results = job.evaluate(job.model, foreign)
        names = chosen_corruptions(config.more.corruptions, num_channels=job.data.in_chans)
        corrupted = []
        if names:
            corrupted = evaluate_corruptions(job.model, job.data.test, names, config.more.severities, job.place)
    hub, is_main_process = config.hub, job.accelerator.is_main_process
    if is_main_process:
        _write(job, results, corrupted)
    job.accelerator.end_training()
    if is_main_process and hub.push_to_hub:
        with clean_exit(PushError):
            url = push_evaluation(
                config.output_path, str(config.repo_id), create_pr=hub.create_pr, publish_images=hub.publish_images
            )
        show(f"pushed to {url}\n")


def shell_command(config: EvaluateConfig) -> str:
    """The words of a command that repeats the measurement, without local paths."""
    settings = config_to_dict(config)
    defaults = config_to_dict(EvaluateConfig(model=config.model))
    given: dict[str, object] = {"dataset_name": plain_name(config.data.dataset_name)}
    for name, value in settings.items():
        if name not in NOT_THE_NUMBERS and value != defaults[name]:
            given.setdefault(name, public_value(value))
    return shlex.join([*command("evaluate").split(), plain_name(config.model), *setting_words(given)])


def _prepare(config: EvaluateConfig, lock: RunLock) -> tuple[Job[EvaluateConfig], Sequence[ForeignAttack]]:
    """Reject what can be rejected, before anything is written."""
    accelerator = begin(config, OWNED_BY_EVALUATION)
    chosen_corruptions(config.more.corruptions, num_channels=3)  # whether the names exist
    foreign = load_foreign_attacks(config.more.foreign_attack)
    if config.hub.push_to_hub and accelerator.is_main_process:
        check_target(config.repo_id, create_pr=config.hub.create_pr)
    loaded = load_pixel_model(config.model, revision=config.model_revision)
    chosen_corruptions(config.more.corruptions, num_channels=loaded.preprocessing.in_chans)
    threat_model = threat_model_of(config.attack, loaded, eval_step_size=config.evaluation.eval_step_size)
    with accelerator.main_process_first():
        data = load_test_data(
            config.data, loaded.preprocessing, what_trained(loaded), group_column=config.more.group_column
        )
    job = make_job(
        config, accelerator, lock, loaded=loaded, data=data, threat_model=threat_model, owned=OWNED_BY_EVALUATION
    )
    return job, foreign


def _write(
    job: Job[EvaluateConfig], results: Mapping[str, AttackResult], corrupted: Sequence[CorruptionResult]
) -> None:
    """Predictions, report, figures, page and card section into the output folder, and the table onto the terminal."""
    config, data, threat_model = job.config, job.data, job.threat_model
    report = job.report(results, corrupted)
    with clean_exit(CorruptImageError, OSError):
        images, settings, seed = data.test, config.evaluation, config.seed
        examples = run_examples(job.model, images, settings, results, threat_model=threat_model, seed=seed)
        write_evaluation(
            report,
            config.output_path,
            results=results,
            examples=examples,
            command=shell_command(config),
            groups=data.groups,
        )
    remove_partial_results(config.output_path)
    tables = [results_table(report), *(rows for _, rows in breakdown_tables(report))]
    show("\n\n".join(map(text_table, tables)) + f"\n\neverything is in {config.output_path}\n")
