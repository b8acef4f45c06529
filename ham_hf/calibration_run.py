"""The fairness dial of one model: check, search the shifts, evaluate, write; and what a training shares with it."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ham_hf.artifacts import CONFIG_NAME, OWNED_BY_CALIBRATION, WEIGHTS_NAME
from ham_hf.attacks import ThreatModel
from ham_hf.config import CalibrateConfig, CalibrationConfig, DataConfig
from ham_hf.data import ImageData, Images, load_image_data
from ham_hf.data.class_folders import split_name
from ham_hf.data.decoding import CorruptImageError
from ham_hf.data.provenance import plain_name
from ham_hf.evaluation import calibration
from ham_hf.evaluation.batch_sharing import Workplace, remove_partial_results
from ham_hf.evaluation_run import Job, begin, faults_of_work, make_job, refusals
from ham_hf.faults import clean_exit
from ham_hf.fitting import (
    ReorderedLogits,
    align_classes,
    find_validation_part,
    num_logits,
    provenance_of,
    threat_model_of,
)
from ham_hf.models import LoadedModel, PixelModel, create_backbone, load_pixel_model
from ham_hf.models.export import ExportInfo, export_for_timm
from ham_hf.models.head import check_foldable, check_shifted_logits, fold_shifts, read_biases, write_biases
from ham_hf.models.pixel_model import imagenet_synsets
from ham_hf.models.source import Origin, complete_name, read_origin
from ham_hf.reporting.class_examples import run_examples
from ham_hf.reporting.formats import text_table
from ham_hf.reporting.method_text import exchange_sentence
from ham_hf.reporting.report import CalibrationReport
from ham_hf.reporting.run_report import calibrated_report, model_section, write_run
from ham_hf.reporting.tables import results_table
from ham_hf.terminal import show
from ham_hf.training.run_folder import RunLock

logger = logging.getLogger("ham_hf.calibrate")

CALIBRATION_KEY = "calibration"
"""Key of the metadata in ``config.json`` under which original bias and shifts stand."""


def calibrate(config: CalibrateConfig, lock: RunLock) -> None:
    """Run one calibration; ``lock`` is acquired here, on the main process."""
    with refusals():
        job, held_out, origin = _prepare(config, lock)
        loaded, data, folder = job.loaded, job.data, config.output_path
        names = own_class_names(loaded, job.model, data.class_names)
    logger.info("calibrating %s on %s of %s", config.model, held_out.origin, data.name)
    advice = "lower --per_device_eval_batch_size, or use a device with more memory (--use_cpu takes the CPU's)"
    with faults_of_work(advice):
        found = set_dial(
            job.model, held_out, config.calibration, threat_model=job.threat_model, place=job.place, tags=origin.tags
        )
        shifts = shifts_of_logits(job.model, found.shifts, num_logits(loaded))
        shifted, _ = align_classes(folded(loaded, shifts), data.class_names)
        results = job.evaluate(shifted)
    if job.accelerator.is_main_process:
        with clean_exit(ValueError, CorruptImageError, OSError):
            model_license = config.model_license or origin.license
            exported = export_calibrated(config, loaded, found, shifts, class_names=names, model_license=model_license)
            name, preprocessing = plain_name(config.model), loaded.preprocessing
            model = model_section(name, exported, preprocessing, base_model=origin.base_model)
            report = calibrated_report(job.report(results), found, model, model_license=model_license)
            examples = run_examples(
                shifted, data.test, config.evaluation, results, threat_model=job.threat_model, seed=config.seed
            )
            write_run(report, folder, results=results, examples=examples)
            remove_partial_results(folder)
            sentence = exchange_sentence(found)
            show(f"{sentence}\n\n{text_table(results_table(report))}\n\neverything is in {folder}\n")
    job.accelerator.end_training()


def _prepare(config: CalibrateConfig, lock: RunLock) -> tuple[Job[CalibrateConfig], HeldOut, Origin]:
    """Everything that can be refused, before anything is written."""
    accelerator = begin(config, OWNED_BY_CALIBRATION)
    with accelerator.main_process_first():
        loaded = load_pixel_model(config.model, revision=config.model_revision)
        restore_original(loaded)
        check_foldable(loaded.model, num_classes=num_logits(loaded), image_size=loaded.preprocessing.image_size)
        threat_model = threat_model_of(config.attack, loaded, eval_step_size=config.evaluation.eval_step_size)
        held_out = images_to_calibrate_on(loaded, config)
        origin = read_origin(config.model, revision=config.model_revision)
    data = held_out.data
    job = make_job(
        config, accelerator, lock, loaded=loaded, data=data, threat_model=threat_model, owned=OWNED_BY_CALIBRATION
    )
    return job, held_out, origin


@dataclass(frozen=True, eq=False, kw_only=True)
class HeldOut:
    """Images to find the shifts on; ValueError if there are too few of a class.

    Attributes:
        data: the dataset; its test images are evaluated, its classes are those of ``images``.
        origin: which images these are, to follow "found on".
        how_to_get_more: which setting gives more of them.
        seen_in_training: whether the model was trained on them.
    """

    images: Images
    data: ImageData
    origin: str
    how_to_get_more: str
    seen_in_training: bool = False

    def __post_init__(self) -> None:
        calibration.check_held_out(self.images.labels, self.data.class_names, how=self.how_to_get_more)


def restore_original(loaded: LoadedModel) -> None:
    """Restore a calibrated model's original bias, in place, so that calibrating again does not add up."""
    if (record := loaded.metadata.get(CALIBRATION_KEY)) is not None:
        logger.info(
            "the model was calibrated with fairness %s: starting from its original bias", record.get("fairness")
        )
        write_biases(loaded.model.backbone, record["original_bias"])


def images_to_calibrate_on(loaded: LoadedModel, config: CalibrateConfig) -> HeldOut:
    """Find the images that a model's training run held out, or a named split; never those of the test.

    Raises:
        ValueError: if the model does not record what it was trained on and no split is named, or the named split is
            the test split, or the training split without ``allow_training_images``.
    """
    trained = provenance_of(loaded)
    name = config.data.dataset_name or (trained.dataset if trained else None)
    if name is None:
        raise ValueError(
            "the model does not record what it was trained on: name the data with --dataset_name, and with "
            "--calibration_split a split of it that the model was not trained on"
        )
    settings = replace(config.data.named(name), augmentation="none")
    if config.calibration_split is not None:
        return _named_split(loaded, settings, config, config.calibration_split)
    data = find_validation_part(loaded, settings)
    # It refuses a model without a record, and one whose run held nothing out.
    assert trained is not None and data.validation is not None  # noqa: S101, PT018
    return HeldOut(
        images=data.validation,
        data=data,
        origin=f"the {len(data.validation)} images of split {trained.train_split} that its training run held out "
        f"(seed {trained.seed}, share {trained.validation_fraction:g})",
        how_to_get_more="train with a larger --validation_fraction, or name another --calibration_split",
    )


def _named_split(loaded: LoadedModel, settings: DataConfig, config: CalibrateConfig, split: str) -> HeldOut:
    inputs = loaded.preprocessing

    def loaded_with(**changes: Any) -> ImageData:  # noqa: ANN401 (settings of data)
        wanted = replace(settings, validation_fraction=0.0, **changes)
        return load_image_data(wanted, inputs, seed=config.seed, image_size=inputs.image_size)

    # Training images are not looked at: as many as there are classes are loaded, so that the loader has some.
    data = loaded_with(limit_train_examples=num_logits(loaded))
    _check_test_images(loaded, data, settings.test_fraction)
    known, trained = data.provenance, provenance_of(loaded)
    assert known is not None  # noqa: S101 (a dataset that was loaded)
    if split == known.test_split:
        raise ValueError(
            f"--calibration_split {split} is the test split, whose images are for the evaluation alone; name another "
            f"one, or choose the test images with --test_split"
        )
    is_train = split == known.train_split
    # The other split is named, so that none is held out of this one; of it a single image is read.
    others = {} if is_train else {"train_split": split, "test_split": known.test_split or known.train_split}
    limits = {"limit_train_examples": config.limit_calibration_examples, "limit_test_examples": 1}
    try:
        part = loaded_with(**others, **limits)
    except ValueError as error:
        raise ValueError(str(error).replace("--train_split", "--calibration_split")) from error
    # Of a dataset without train, the first part that is read may be its validation or test split.
    seen = is_train and split_name(split) not in ("validation", "test")
    seen = seen or (trained is not None and part.fingerprint is not None and trained.is_of(part.fingerprint))
    if seen and not config.allow_training_images:
        raise ValueError(
            f"--calibration_split {split} is the training split: shifts that are found on images which the model was "
            "trained on may be wrong for new ones; name another split, or say --allow_training_images"
        )
    assert isinstance(part.train, Images)  # noqa: S101 (a configuration with a split has no stream)
    images = _with_labels_by_name(part.train, part.class_names, data.class_names, split)
    whose = "its own training images, " if seen else ""
    return HeldOut(
        images=images,
        data=data,
        origin=f"{whose}{len(images)} images of split {split}",
        seen_in_training=seen,
        how_to_get_more="choose a larger --calibration_split, or raise --limit_calibration_examples",
    )


def _check_test_images(loaded: LoadedModel, data: ImageData, test_fraction: float) -> None:
    """Refuse to test on training images, where a dataset has no test split and another share was held out of train."""
    trained = loaded.metadata.get("test_fraction", test_fraction)
    same = loaded.metadata.get("dataset") == plain_name(data.name)
    if same and data.test_split_origin.startswith("held out") and trained != test_fraction:
        raise ValueError(
            f"--test_fraction {test_fraction} would test on images that the model was trained on; "
            f"it was trained with --test_fraction {trained}"
        )


def _with_labels_by_name(images: Images, names: Sequence[str], wanted: Sequence[str], split: str) -> Images:
    """The images with labels that count ``wanted`` instead of ``names``."""
    if tuple(names) == tuple(wanted):
        return images
    if unknown := sorted({*names} - {*wanted}):
        raise ValueError(
            f"--calibration_split {split} has classes that the other splits do not have: {', '.join(unknown[:5])}"
        )
    place = torch.tensor([list(wanted).index(name) for name in names])
    return images.relabeled(place[images.labels])


def set_dial(
    model: nn.Module,
    held_out: HeldOut,
    config: CalibrationConfig,
    *,
    threat_model: ThreatModel,
    place: Workplace,
    tags: Sequence[str] = (),
) -> CalibrationReport:
    """Find the shifts for held-out images; finished batches are kept in the output folder, as those of an evaluation.

    The unwrapped pixel model has its logits in the order of the dataset's classes, and is moved to the device.
    ``tags`` are those of its card.
    """
    model = model.to(place.accelerator.device).to(memory_format=torch.channels_last)
    since = time.perf_counter()
    found = calibration.calibrate(
        model, held_out.images, config, place, threat_model=threat_model, num_classes=len(held_out.data.class_names)
    )
    return CalibrationReport(
        **vars(found),
        max_average_drop=config.max_average_drop,
        images=held_out.origin,
        seen_in_training=held_out.seen_in_training,
        seconds=time.perf_counter() - since,
        tags=tuple(tags),
    )


def validation_part(data: ImageData, *, seed: int) -> HeldOut:
    """Return the images that a training run holds out, to calibrate on at its end."""
    assert data.validation is not None  # noqa: S101 (the configuration says that there is one)
    return HeldOut(
        images=data.validation,
        data=data,
        origin=f"the {len(data.validation)} images that training held out (seed {seed})",
        how_to_get_more="raise --validation_fraction",
    )


def fold_into(model: PixelModel, report: CalibrationReport) -> dict[str, object]:
    """Put the shifts into the bias of a model whose logits are in the dataset's order; returns its record."""
    shifts = torch.tensor(report.shifts)
    record = calibration_record(model, report, shifts)
    fold_shifts(model.backbone, shifts)
    return record


def shifts_of_logits(aligned: nn.Module, shifts: Sequence[float], num_classes: int) -> Tensor:
    """Shifts (num_classes,) float32 in the order of the model's own logits; 0 for classes that the dataset lacks.

    ``aligned`` is what `ham_hf.fitting.align_classes` made of the model; ``shifts`` are in the order of the dataset.
    """
    order = aligned.order.cpu() if isinstance(aligned, ReorderedLogits) else torch.arange(num_classes)
    return torch.zeros(num_classes).index_copy(0, order, torch.tensor(shifts))


def own_class_names(loaded: LoadedModel, aligned: nn.Module, class_names: Sequence[str]) -> tuple[str, ...]:
    """A name for each of the model's logits: its own, or the dataset's and, for what that lacks, ImageNet's."""
    if loaded.class_names is not None or not isinstance(aligned, ReorderedLogits):
        return loaded.class_names or tuple(class_names)
    number = num_logits(loaded)
    names = [*(imagenet_synsets(number) or map(str, range(number)))]
    for place, name in zip(aligned.order.tolist(), class_names, strict=True):
        names[place] = name
    return tuple(names)


def folded(loaded: LoadedModel, shifts: Tensor) -> LoadedModel:
    """The model with the shifts (C,), in the order of its logits, in its bias; ``loaded`` is not changed."""
    shifted = copy.deepcopy(loaded.model)
    fold_shifts(shifted.backbone, shifts)
    return replace(loaded, model=shifted)


def calibration_record(original: PixelModel, report: CalibrationReport, shifts: Tensor) -> dict[str, object]:
    """Record of a calibration for ``config.json``, enough to undo it; ``shifts`` (C,) in the model's order."""
    return {
        "fairness": report.fairness,
        "shifts": shifts.tolist(),
        "original_bias": read_biases(original.backbone, len(shifts)),
        "images": report.images,
        "seen_in_training": report.seen_in_training,
        "attack": dict(report.attack),
    }


def export_calibrated(
    config: CalibrateConfig,
    loaded: LoadedModel,
    report: CalibrationReport,
    shifts: Tensor,
    *,
    class_names: Sequence[str],
    model_license: str,
) -> ExportInfo:
    """Write the folded model into the output folder, and compare what plain timm makes of it with logits plus shift.

    ``shifts`` (C,) and ``class_names`` are in the order of the model's logits. If the comparison fails, nothing of the
    export is left.
    """
    name = complete_name(config.model, config.model_revision)
    # The network as it was trained, where it was published inside another one.
    backbone: Any = create_backbone(
        name, pretrained=True, num_classes=len(shifts), preprocessing=loaded.preprocessing, model_args={}
    )
    original = loaded.model.cpu()
    write_biases(backbone, read_biases(original.backbone, len(shifts)))
    fold_shifts(backbone, shifts)
    folder = config.output_path
    exported = export_for_timm(
        backbone,
        folder,
        preprocessing=loaded.preprocessing,
        class_names=class_names,
        metadata={**loaded.metadata, CALIBRATION_KEY: calibration_record(original, report, shifts)},
        model_license=model_license,
        tag=str(backbone.pretrained_cfg.get("tag") or "fair"),
    )
    try:
        published = load_pixel_model(str(folder)).model
        check_shifted_logits(original, published, shifts, loaded.preprocessing.image_size)
    except ValueError:
        for written in (WEIGHTS_NAME, CONFIG_NAME):
            (folder / written).unlink(missing_ok=True)
        raise
    return exported
