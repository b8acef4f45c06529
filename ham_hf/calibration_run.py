"""One calibration of an existing model: check, search the shifts, evaluate, write."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor, nn

from ham_hf.config import CalibrateConfig
from ham_hf.data.decoding import CorruptImageError
from ham_hf.dial import (
    HeldOut,
    export_calibrated,
    folded,
    images_to_calibrate_on,
    own_class_names,
    restore_original,
    set_dial,
    shifts_of_logits,
)
from ham_hf.evaluation import AttackResult
from ham_hf.evaluation.partial_results import remove_partial_results
from ham_hf.evaluation_run import Job, begin, faults_of_work, refusals, take_folder
from ham_hf.faults import clean_exit
from ham_hf.fitting import align_classes, num_logits, threat_model_of
from ham_hf.models import load_pixel_model
from ham_hf.models.head import check_foldable
from ham_hf.models.source import Origin, read_origin
from ham_hf.reporting.calibration import CalibrationReport, exchange_sentence
from ham_hf.reporting.class_examples import run_examples
from ham_hf.reporting.formats import text_table
from ham_hf.reporting.run_report import calibrated_report, write_run
from ham_hf.reporting.tables import results_table
from ham_hf.terminal import show
from ham_hf.training.run_folder import OWNED_BY_CALIBRATION, RunLock, check_calibration_dir

logger = logging.getLogger("ham_hf.calibrate")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job(Job[CalibrateConfig]):
    """An evaluation with the images to calibrate on and what the model's card says."""

    held_out: HeldOut
    origin: Origin


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
    accelerator = begin(config, check_calibration_dir)
    with accelerator.main_process_first():
        loaded = load_pixel_model(config.model, revision=config.model_revision)
        restore_original(loaded)
        num_classes, image_size = num_logits(loaded), loaded.preprocessing.image_size
        check_foldable(loaded.model, num_classes=num_classes, image_size=image_size)
        held_out = images_to_calibrate_on(loaded, config)
        origin = read_origin(config.model, revision=config.model_revision)
    model, class_order = align_classes(loaded, held_out.data.class_names)
    job = _Job(
        config=config,
        accelerator=accelerator,
        loaded=loaded,
        model=model,
        class_order=class_order,
        data=held_out.data,
        threat_model=threat_model_of(config.attack, loaded, eval_step_size=config.evaluation.eval_step_size),
        held_out=held_out,
        origin=origin,
    )
    take_folder(config.output_path, accelerator, lock, OWNED_BY_CALIBRATION)
    return job


def _search(job: _Job) -> _Found:
    """Find the shifts, and evaluate the model with them in full."""
    config = job.config
    logger.info("calibrating %s on %s of %s", config.model, job.held_out.origin, job.data.name)
    calibration = set_dial(
        job.model,
        job.held_out,
        config.calibration,
        threat_model=job.threat_model,
        place=job.place,
        tags=job.origin.tags,
    )
    shifts = shifts_of_logits(job.model, calibration.shifts, num_logits(job.loaded))
    shifted, _ = align_classes(folded(job.loaded, shifts), job.data.class_names)
    return _Found(calibration=calibration, shifts=shifts, shifted=shifted, results=job.evaluate(shifted))


def _publish(job: _Job, found: _Found) -> None:
    """Model, report, figures and card."""
    config, data, folder = job.config, job.data, job.config.output_path
    model_license = config.model_license or job.origin.license
    exported = export_calibrated(
        config,
        job.loaded,
        found.calibration,
        found.shifts,
        class_names=own_class_names(job.model, data.class_names),
        model_license=model_license,
    )
    report = calibrated_report(
        job.report(found.results), found.calibration, exported, job.origin, model_license=model_license
    )
    examples = run_examples(
        found.shifted, data.test, config.evaluation, found.results, threat_model=job.threat_model, seed=config.seed
    )
    write_run(report, folder, results=found.results, examples=examples)
    remove_partial_results(folder)
    sentence = exchange_sentence(found.calibration)
    show(f"{sentence}\n\n{text_table(results_table(report))}\n\neverything is in {folder}\n")
