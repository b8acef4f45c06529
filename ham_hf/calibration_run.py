"""One calibration of a model that exists: check, search the shifts, evaluate, write."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel
from ham_hf.config import CalibrateConfig
from ham_hf.data.decoding import CorruptImageError
from ham_hf.dial import (
    HeldOut,
    check_enough_images,
    check_head,
    export_calibrated,
    folded,
    images_to_calibrate_on,
    own_class_names,
    restore_original,
    set_dial,
    shifts_of_logits,
)
from ham_hf.evaluation import AttackResult
from ham_hf.evaluation.autoattack import require_autoattack
from ham_hf.evaluation.partial_results import remove_partial_results
from ham_hf.evaluation.suite import evaluate_on_test
from ham_hf.evaluation_run import faults_of_work, refusals, workplace
from ham_hf.faults import clean_exit
from ham_hf.fitting import align_classes, num_logits, threat_model_of
from ham_hf.models import LoadedModel, load_pixel_model
from ham_hf.models.origin import Origin, read_origin
from ham_hf.reporting.calibration import CalibrationReport, exchange_sentence
from ham_hf.reporting.class_examples import run_examples
from ham_hf.reporting.formats import text_table
from ham_hf.reporting.run_report import calibrated_report, evaluation_report, write_run
from ham_hf.reporting.tables import results_table
from ham_hf.terminal import show
from ham_hf.training.launch import create_accelerator
from ham_hf.training.run_folder import OWNED_BY_CALIBRATION, RunLock, check_calibration_dir, clear_output_dir

logger = logging.getLogger("ham_hf.calibrate")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    """What was checked and loaded: ``model`` has its logits in the order of the dataset's classes."""

    config: CalibrateConfig
    accelerator: Accelerator
    loaded: LoadedModel
    model: nn.Module
    class_order: str
    held_out: HeldOut
    origin: Origin
    threat_model: ThreatModel


@dataclass(frozen=True, eq=False, kw_only=True)
class _Found:
    """Shifts, the model with them, and how it does on the test images."""

    calibration: CalibrationReport
    shifts: Tensor
    shifted: nn.Module
    results: dict[str, AttackResult]


def calibrate(config: CalibrateConfig, lock: RunLock) -> None:
    """Run one calibration; ``lock`` is acquired here, on the main process."""
    with refusals():
        job = _prepare(config, lock)
    with faults_of_work(
        "lower --per_device_eval_batch_size, or use a device with more memory (--use_cpu takes the CPU's)"
    ):
        found = _search(job)
    if job.accelerator.is_main_process:
        with clean_exit(ValueError, CorruptImageError, OSError):
            _publish(job, found)
    job.accelerator.end_training()


def _prepare(config: CalibrateConfig, lock: RunLock) -> _Job:
    """Everything that can be refused, before anything is written."""
    folder = config.output_path
    if config.evaluation.autoattack:
        require_autoattack()
    check_calibration_dir(folder, overwrite=config.overwrite_output_dir)
    accelerator = create_accelerator(use_cpu=config.use_cpu, ddp_timeout=config.ddp_timeout)
    with accelerator.main_process_first():
        loaded, held_out = load(config)
        origin = read_origin(config.model, revision=config.model_revision)
    model, class_order = align_classes(loaded, held_out.data.class_names)
    job = _Job(
        config=config,
        accelerator=accelerator,
        loaded=loaded,
        model=model,
        class_order=class_order,
        held_out=held_out,
        origin=origin,
        threat_model=threat_model_of(config.attack, loaded, eval_step_size=config.evaluation.eval_step_size),
    )
    if accelerator.is_main_process:
        lock.acquire()
        clear_output_dir(folder, OWNED_BY_CALIBRATION)
    accelerator.wait_for_everyone()
    return job


def _search(job: _Job) -> _Found:
    """Find the shifts, and evaluate the model with them in full."""
    config, data, place = job.config, job.held_out.data, workplace(job.config, job.accelerator)
    logger.info("calibrating %s on %s of %s", config.model, job.held_out.origin, data.name)
    calibration = set_dial(
        job.model,
        job.held_out,
        config.calibration,
        threat_model=job.threat_model,
        place=place,
        batch_size=config.evaluation.per_device_eval_batch_size,
        tags=job.origin.tags,
    )
    shifts = shifts_of_logits(job.model, calibration.shifts, num_logits(job.loaded))
    shifted, _ = align_classes(folded(job.loaded, shifts), data.class_names)
    results = evaluate_on_test(
        shifted.to(job.accelerator.device).to(memory_format=torch.channels_last),
        data,
        config.evaluation,
        threat_model=job.threat_model,
        place=place,
    )
    return _Found(calibration=calibration, shifts=shifts, shifted=shifted, results=results)


def _publish(job: _Job, found: _Found) -> None:
    """Model, report, figures and card."""
    config, data, folder = job.config, job.held_out.data, job.config.output_path
    model_license = config.model_license or job.origin.license
    exported = export_calibrated(
        config,
        job.loaded,
        found.calibration,
        found.shifts,
        class_names=own_class_names(job.model, data.class_names),
        model_license=model_license,
    )
    evaluated = evaluation_report(
        config,
        job.loaded,
        data,
        found.results,
        job.accelerator,
        threat_model=job.threat_model,
        class_order=job.class_order,
    )
    report = calibrated_report(evaluated, found.calibration, exported, job.origin, model_license=model_license)
    examples = run_examples(
        found.shifted, data.test, config.evaluation, found.results, threat_model=job.threat_model, seed=config.seed
    )
    write_run(report, folder, results=found.results, examples=examples)
    remove_partial_results(folder)
    sentence = exchange_sentence(found.calibration)
    show(f"{sentence}\n\n{text_table(results_table(report))}\n\neverything is in {folder}\n")


def load(config: CalibrateConfig) -> tuple[LoadedModel, HeldOut]:
    """The original model and the images to calibrate it on, both checked."""
    loaded = load_pixel_model(config.model, revision=config.model_revision)
    restore_original(loaded)
    check_head(loaded.model, num_classes=num_logits(loaded), image_size=loaded.preprocessing.image_size)
    held_out = images_to_calibrate_on(loaded, config)
    check_enough_images(held_out)
    return loaded, held_out
