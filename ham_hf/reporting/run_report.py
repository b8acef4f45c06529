"""Reports of finished runs and the files made of them."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ham_hf import __version__
from ham_hf.artifacts import EVALUATION_NAME, LOG_NAME, PAGE_NAME, TRAIN_CONFIG_NAME
from ham_hf.attacks import ThreatModel
from ham_hf.config import CalibrateConfig, EvaluateConfig, HubConfig, TrainConfig, config_to_dict, config_to_yaml
from ham_hf.data import ImageData, TestData
from ham_hf.data.image_groups import ImageGroups
from ham_hf.evaluation import AttackResult
from ham_hf.evaluation.corruption_accuracy import CorruptionResult
from ham_hf.evaluation.corruptions import constants_of
from ham_hf.evaluation.verdicts import Verdicts, verdicts_of, write_verdicts
from ham_hf.files import atomic_write, replacing
from ham_hf.hub_config import is_hub_id
from ham_hf.intervals import intervals_of
from ham_hf.metrics import confusion_matrix, summarize
from ham_hf.models import LoadedModel, Preprocessing
from ham_hf.models.export import ExportInfo
from ham_hf.reporting.breakdowns import corruption_report, group_report
from ham_hf.reporting.card import evaluation_document, write_card
from ham_hf.reporting.class_examples import RunExamples, picture, write_examples
from ham_hf.reporting.eval_results import write_eval_results
from ham_hf.reporting.figures import save_figures
from ham_hf.reporting.method_text import selected_too_early, training_images_note
from ham_hf.reporting.page import PageRun, page_html
from ham_hf.reporting.report import (
    AttackReport,
    CalibrationReport,
    DatasetReport,
    Environment,
    ModelReport,
    RunReport,
    ThreatModelReport,
    TrainingReport,
    write_report,
)
from ham_hf.training.environment import recorded, rounding
from ham_hf.training.log import read_log
from ham_hf.training.resume import Progress

logger = logging.getLogger(__name__)

MAX_CONFUSION_CLASSES = 200
"""Above this number of classes the confusion matrix is left out: it grows with the square."""


def attack_report(result: AttackResult, num_classes: int) -> AttackReport:
    """Summarize the outcome of one evaluation.

    Raises:
        ValueError: if shapes differ, a label or prediction is out of range, or there is no example.
    """
    labels, predictions = result.labels, result.predictions
    if predictions.shape != labels.shape or bool(((predictions < -1) | (predictions >= num_classes)).any()):
        raise ValueError(
            f"{result.name}: expected {len(labels)} predictions in [0, {num_classes}), got shape "
            f"{tuple(predictions.shape)} with values {int(predictions.min())}..{int(predictions.max())}; has the "
            "model as many outputs as the dataset has classes?"
        )
    summary = summarize(result.flags, labels, num_classes)
    confusion = None
    if num_classes <= MAX_CONFUSION_CLASSES:
        confusion = tuple(tuple(row) for row in confusion_matrix(predictions, labels, num_classes).tolist())
    return AttackReport(
        name=result.name,
        settings=result.settings,
        summary=summary,
        confusion=confusion,
        seconds=result.seconds,
        intervals=intervals_of(summary),
    )


def attack_reports(results: Mapping[str, AttackResult], num_classes: int) -> dict[str, AttackReport]:
    """Summarize every evaluation, by name."""
    return {name: attack_report(result, num_classes) for name, result in results.items()}


def verdict_report(verdicts: Verdicts, *, seconds: float) -> AttackReport | None:
    """Summarize the verdict on the images that every attack saw; None without an attack.

    ``seconds`` is the duration of all evaluations together, clean included.
    """
    judged = verdicts.judged
    if not bool(judged.any()):
        return None
    summary = summarize(verdicts.withstood[judged], verdicts.labels[judged], len(verdicts.class_names))
    return AttackReport(
        name="verdict",
        settings={"attacks": list(verdicts.attacks)},
        summary=summary,
        confusion=None,
        seconds=seconds,
        intervals=intervals_of(summary),
    )


def verdict_of(results: Mapping[str, AttackResult], class_names: Sequence[str]) -> AttackReport | None:
    """The verdict of these results; None without an attack."""
    return verdict_report(verdicts_of(results, class_names), seconds=sum(found.seconds for found in results.values()))


def hub_dataset_id(name: str) -> str | None:
    """``name`` if it is the id of a Hub dataset, None for "digits" and for a local path."""
    return name if is_hub_id(name) and name != "digits" and not Path(name).exists() else None


def utc_now() -> str:
    """Current UTC time to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment(*, device: torch.device, num_processes: int) -> Environment:
    """Describe the software and hardware of this process."""
    packages = ("torch", "torchvision", "timm", "accelerate", "datasets", "huggingface-hub", "safetensors")
    versions = {package.replace("-", "_"): version(package) for package in packages}
    device_name = device.type
    if device.type != "cpu":
        # Apple's has no name.
        name_of = getattr(torch.get_device_module(device), "get_device_name", None)
        device_name = name_of(device) if name_of is not None else device.type
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions={"ham_hf": __version__, **versions},
        device=device_name,
        num_processes=num_processes,
        num_threads=torch.get_num_threads(),
        commit=source_commit(Path(__file__).resolve().parents[2]),
        variables=recorded(),
    )


def source_commit(root: Path) -> str | None:
    """Commit of the checkout at ``root``, with "-dirty" if tracked or new files differ; None if it is no checkout.

    ``root`` itself must be the checkout: an installed package may lie inside somebody else's repository.
    """
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    answers = []
    for question in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            answer = subprocess.run([git, *question], cwd=root, capture_output=True, text=True, timeout=60)  # noqa: S603
        except subprocess.TimeoutExpired:  # a checkout on a slow file system: not worth a report
            return None
        if answer.returncode:
            return None
        answers.append(answer.stdout.strip())
    commit, changes = answers
    return f"{commit}-dirty" if changes else commit


def dataset_report(data: TestData) -> DatasetReport:
    """The dataset in the form of the report."""
    return DatasetReport(
        name=data.name,
        hub_id=hub_dataset_id(data.name),
        config_name=data.config_name,
        revision=data.revision,
        class_names=data.class_names,
        num_train=len(data.train) if isinstance(data, ImageData) else 0,
        num_validation=len(data.validation or ()) if isinstance(data, ImageData) else 0,
        num_test=len(data.test),
        test_split_origin=data.test_split_origin,
        num_skipped=data.num_skipped,
        augmentation=data.augmentation,
        trained_on=data.provenance.record() if data.provenance is not None else None,
        num_test_in_train=data.num_test_in_train,
        notes=data.notes,
        class_order="by name",
        num_model_classes=len(data.class_names),
    )


def model_section(
    name: str, exported: ExportInfo, preprocessing: Preprocessing, *, base_model: str | None = None
) -> ModelReport:
    """The network: its name, its export, and the Hub id of the weights it started from."""
    return ModelReport(
        name=name,
        architecture=exported.architecture,
        base_model=base_model,
        needs_ham_hf=exported.needs_ham_hf,
        num_parameters=exported.num_parameters,
        upsample=exported.upsample,
        **asdict(preprocessing),
    )


def training_report(
    config: TrainConfig,
    model: ModelReport,
    data: ImageData,
    results: Mapping[str, AttackResult],
    accelerator: Accelerator,
    *,
    progress: Progress,
    best: Mapping[str, Any],
    peak_memory_bytes: int | None,
    calibration: CalibrationReport | None = None,
) -> RunReport:
    """Report of a training run; ``best`` is the state that the evaluated weights were selected with.

    ``peak_memory_bytes`` are those of the end of training, as evaluation may need more. The passes of ``calibration``
    count among those of the run.
    """
    settings, overflowed = config_to_dict(config), progress.overflowed_updates
    training = TrainingReport(
        num_train_epochs=len({record["epoch"] for record in progress.history}),
        steps=progress.step,
        skipped_updates=progress.skipped_updates,
        seconds=progress.seconds,
        selection_metric=best["metric"],
        selected_step=best["step"],
        selected_epoch=best["epoch"],
        history=tuple(progress.history),
        peak_memory_bytes=peak_memory_bytes,
        passes=progress.passes + (0 if calibration is None else calibration.passes),
        changes=tuple(progress.changes),
    )
    notes = list(selected_too_early(settings, training))
    for sentence in notes:
        logger.warning(sentence)
    if overflowed:
        notes.append(f"{overflowed} of {progress.step} updates were skipped as their gradient overflowed in float16.")
    return RunReport(
        model=model,
        dataset=dataset_report(data),
        config=settings,
        threat_model=ThreatModelReport(norm=config.attack.norm, epsilon=config.attack.epsilon),
        results=attack_reports(results, len(data.class_names)),
        training=training,
        environment=environment(device=accelerator.device, num_processes=accelerator.num_processes),
        seeds={"seed": config.training.seed},
        created=utc_now(),
        notes=(*notes, *training.changes, *rounding()),
        verdict=verdict_of(results, data.class_names),
        calibration=calibration,
    )


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write ``train_config.yaml``, which repeats the run wherever it is read.

    Settings that concern this one run only have their defaults: resuming, overwriting and pushing (``report.json``
    has everything).
    """
    again = replace(
        config,
        training=replace(config.training, resume_from_checkpoint=None, overwrite_output_dir=False),
        hub=HubConfig(model_license=config.hub.model_license),
    )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / TRAIN_CONFIG_NAME, config_to_yaml(again))


def evaluation_report(
    config: EvaluateConfig | CalibrateConfig,
    loaded: LoadedModel,
    data: TestData,
    results: Mapping[str, AttackResult],
    accelerator: Accelerator,
    *,
    threat_model: ThreatModel,
    class_order: str,
    corrupted: Sequence[CorruptionResult] = (),
) -> RunReport:
    """Report of an evaluation of a model that exists; ``class_order`` is that of `DatasetReport`.

    ``corrupted`` holds the results on corrupted images.
    """
    backbone: Any = loaded.model.backbone
    architecture = str(backbone.pretrained_cfg["architecture"])
    return RunReport(
        model=ModelReport(
            name=config.model,
            architecture=architecture,
            base_model=None,
            needs_ham_hf=architecture.endswith("_cifar"),
            num_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
            upsample=loaded.model.upsample,
            **asdict(loaded.preprocessing),
        ),
        dataset=replace(
            dataset_report(data),
            trained_on=loaded.metadata.get("trained_on"),
            class_order=class_order,
            num_model_classes=int(backbone.num_classes),
        ),
        config=config_to_dict(config),
        threat_model=ThreatModelReport(norm=threat_model.norm, epsilon=float(threat_model.epsilon)),
        results=attack_reports(results, len(data.class_names)),
        training=None,
        environment=environment(device=accelerator.device, num_processes=accelerator.num_processes),
        seeds={"seed": config.seed},
        created=utc_now(),
        verdict=verdict_of(results, data.class_names),
        notes=(*loaded.notes, *rounding()),
        groups=group_report(verdicts_of(results, data.class_names, data.groups)),
        corruptions=corruption_report(
            corrupted, data.test.labels, len(data.class_names), constants=constants_of(data.image_size)
        ),
    )


def calibrated_report(
    evaluated: RunReport, calibration: CalibrationReport, model: ModelReport, *, model_license: str
) -> RunReport:
    """Report of a model with class shifts folded in, from that of its evaluation and its own section."""
    config = {**evaluated.config, "model": model.name, "model_license": model_license}
    note = training_images_note(calibration)
    notes = (*evaluated.notes, note) if note is not None else evaluated.notes
    return replace(evaluated, model=model, config=config, calibration=calibration, notes=notes)


def write_run(
    report: RunReport,
    folder: Path,
    *,
    results: Mapping[str, AttackResult],
    examples: RunExamples,
    repo_id: str | None = None,
) -> None:
    """Predictions, report, figures, card and page of a model that is in ``folder`` already, with its log if any.

    ``results`` are what ``report`` was made of; ``repo_id`` is "user/name" on the Hub for the card, if it is known.
    """
    _write_numbers(report, folder, results, examples)
    image = examples.strip.clean[0].float().cpu()
    with replacing(folder / "image.png") as part:
        part.write_bytes(picture(image, max(image.shape[-2:]), "PNG"))
    write_card(report, folder, repo_id=repo_id, model_license=str(report.config["model_license"]))
    write_eval_results(report, folder)


def write_evaluation(
    report: RunReport,
    folder: Path,
    *,
    results: Mapping[str, AttackResult],
    examples: RunExamples,
    command: str,
    groups: ImageGroups | None = None,
) -> None:
    """Predictions, report, figures, page, ``EVALUATION.md`` and the results as the Hub reads them.

    ``command`` are the words that measure it again.
    """
    _write_numbers(report, folder, results, examples, groups=groups)
    atomic_write(folder / EVALUATION_NAME, evaluation_document(report, folder, command=command))
    write_eval_results(report, folder, suffix="-evaluation")


def _write_numbers(
    report: RunReport,
    folder: Path,
    results: Mapping[str, AttackResult],
    examples: RunExamples,
    *,
    groups: ImageGroups | None = None,
) -> None:
    """Predictions, report, figures and page; the log is read first, as the report says that a run is finished."""
    log = folder / LOG_NAME
    train_log = [line for line in read_log(log) if line["type"] == "train"] if report.training is not None else []
    verdicts = verdicts_of(results, report.dataset.class_names, groups)
    write_verdicts(verdicts, folder)
    write_report(report, folder)
    save_figures(report, folder, examples=examples.strip, train_log=train_log)
    if examples.of_classes is not None:
        write_examples(examples.of_classes, folder)
    page = page_html([PageRun(report=report, verdicts=verdicts, examples=examples.of_classes)])
    atomic_write(folder / PAGE_NAME, page)
