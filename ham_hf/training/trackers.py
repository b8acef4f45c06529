"""Trackers: TensorBoard, trackio and Weights & Biases, through accelerate, which ignores one that is not installed."""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from ham_hf.files import atomic_write
from ham_hf.metrics import FairnessSummary

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb")
LOGS_NAME = "logs"
"""Folder in the output folder of what trackers write there."""
WANDB_ID_NAME = "wandb_run_id.txt"
MAX_TRACKED_CLASSES = 200
"""With more classes, trackers get no number of each."""


def chosen_trackers(report_to: Sequence[str]) -> tuple[str, ...]:
    """The trackers that ``--report_to`` means, "all" being those installed; ValueError for one that is not."""
    there = tuple(name for name in TRACKERS if importlib.util.find_spec(name) is not None)
    if "all" in report_to:
        if not there:
            raise ValueError(
                f"--report_to all: none of {', '.join(TRACKERS)} is installed; pip install 'ham-hf[track]', or train "
                "with --report_to none"
            )
        return there
    for name in report_to:
        if name not in there:
            raise ValueError(f"--report_to {name} needs the package {name}: pip install {name}")
    return tuple(report_to)


def start_trackers(accelerator: Accelerator, folder: Path, config: Mapping[str, Any], *, step: int) -> None:
    """Begin a run in every tracker of the accelerator, or continue the one that an interrupted run began.

    TensorBoard continues in its folder, where updates after ``step`` are replaced; trackio in the run of the same
    name; Weights & Biases in the run whose id is in the output folder, where updates that it has stay as they are.

    Args:
        accelerator: made with the names of the trackers.
        folder: output folder of the run.
        config: settings of the run by name.
        step: updates done before.

    Raises:
        ValueError: if a tracker cannot begin: no login, no network, a full disk.
    """
    names = [str(name) for name in accelerator.log_with]
    if not names:
        return
    project, name = str(config["project"]), str(config["run_name"] or folder.resolve().name)
    logs = folder / LOGS_NAME
    try:
        options: dict[str, dict[str, object]] = {
            "trackio": {"name": name, "resume": "allow" if step else "never"},
            "wandb": {"name": name, "dir": str(logs), "resume": "allow"},
        }
        if config["trackio_space_id"]:
            options["trackio"]["space_id"] = config["trackio_space_id"]
        if "wandb" in names and accelerator.is_main_process:
            options["wandb"]["id"] = _wandb_id(logs, new=not step)
        if "tensorboard" in names:
            # accelerate's would be called by the project alone.
            board = TensorBoardTracker(f"{project}/{name}", str(logs), purge_step=step + 1 if step else None)
            accelerator.log_with = [board if one == "tensorboard" else one for one in names]
        settings = {key: str(value) for key, value in config.items()}
        accelerator.init_trackers(project, config=settings, init_kwargs=options)
    except Exception as error:  # each tracker has its own
        raise ValueError(
            f"--report_to {' '.join(names)} could not begin: {error}; see to that, or train with --report_to none "
            "(metrics.jsonl holds every number)"
        ) from error


def _wandb_id(logs: Path, *, new: bool) -> str:
    """The id of this run in Weights & Biases, kept for when it is resumed."""
    path = logs / WANDB_ID_NAME
    if new or not path.is_file():
        logs.mkdir(parents=True, exist_ok=True)
        atomic_write(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()


def track(accelerator: Accelerator, numbers: Mapping[str, object], *, step: int) -> None:
    """Pass numbers to the trackers; other values are left out, and an exception in a tracker is logged."""
    plain = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
    try:
        accelerator.log(plain, step=step)
    except Exception:
        logger.exception("the tracker took no numbers of update %d; every number is in the output folder", step)


def track_test_results(
    accelerator: Accelerator, summaries: Mapping[str, FairnessSummary], class_names: Sequence[str], *, step: int
) -> None:
    """Pass the results on the test split, by name of the evaluation, to the trackers, as ``test/EVALUATION/...``."""
    numbers: dict[str, object] = {}
    for name, summary in summaries.items():
        numbers |= {
            f"test/{name}/average": summary.average,
            f"test/{name}/worst_class": summary.worst_class,
            f"test/{name}/worst_30_percent": summary.worst_30_percent,
            f"test/{name}/gap": summary.gap,
        }
        if name != "clean":
            accuracies = [entry.accuracy for entry in summary.per_class]
            numbers |= class_numbers(f"test/{name}/per_class", accuracies, class_names)
    track(accelerator, numbers, step=step)


def class_numbers(prefix: str, values: Sequence[object], class_names: Sequence[str]) -> dict[str, object]:
    """One entry per class, ``PREFIX/CLASS``; nothing above ``MAX_TRACKED_CLASSES`` classes."""
    if len(class_names) > MAX_TRACKED_CLASSES:
        return {}
    words = [" ".join(name.split()).replace("/", "_")[:60] for name in class_names]
    if len(set(words)) < len(words):
        words = [f"{index} {word}" for index, word in enumerate(words)]
    return {f"{prefix}/{word}": value for word, value in zip(words, values, strict=True)}


def end_training(accelerator: Accelerator) -> None:
    """End the trackers and the process group; a tracker that fails now is logged."""
    try:
        accelerator.end_training()
    except Exception:
        logger.exception("the tracker did not end well; every number is in metrics.jsonl")
        accelerator.state.destroy_process_group()
