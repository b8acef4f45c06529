"""Where a run's numbers go: ``metrics.jsonl``, the progress bar, and TensorBoard, trackio and Weights & Biases.

The trackers work through accelerate, which ignores one that is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from tqdm.auto import tqdm

from ham_hf.artifacts import LOG_NAME
from ham_hf.files import atomic_write
from ham_hf.metrics import FairnessSummary

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb")
LOGS_NAME = "logs"
"""Folder in the output folder of what trackers write there."""
WANDB_ID_NAME = "wandb_run_id.txt"
MAX_TRACKED_CLASSES = 200
"""With more classes, trackers get no number of each."""


class RunLog:
    """Log of one run; only the main process writes. Lines that a full disk does not take wait for the next one.

    Args:
        accelerator: its trackers receive every number.
        output_dir: where ``metrics.jsonl`` lies.
        class_names: in label order.
        start_step: updates done before; lines of later updates, left by a run that was cut off, are removed.
        validation_due: whether the run begins with the validation of update ``start_step``: its line is removed too.
        total_steps: updates of the whole run, for the bar.
        show_progress: show a bar on the local main process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        class_names: Sequence[str],
        *,
        start_step: int,
        validation_due: bool,
        total_steps: int,
        show_progress: bool,
    ) -> None:
        self.accelerator = accelerator
        self.path = output_dir / LOG_NAME
        self.class_names = class_names
        self._waiting: list[str] = []
        if accelerator.is_main_process:
            due = ("validation", start_step) if validation_due else None
            kept = [
                record
                for record in (read_log(self.path) if start_step else [])
                if record["step"] <= start_step and (record["type"], record["step"]) != due
            ]
            output_dir.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not (show_progress and accelerator.is_local_main_process),
        )

    def show(self, values: Mapping[str, float | None]) -> None:
        """Show numbers behind the bar; None is left out."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items() if value is not None})

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Append one line to ``metrics.jsonl`` and pass its numbers, and the robust accuracies, to the trackers."""
        if self.accelerator.is_main_process:
            self._waiting.append(json.dumps({"type": kind, "step": step, **values}, allow_nan=False) + "\n")
            self.flush()
        numbers = {f"{kind}/{name}": value for name, value in values.items()}
        robust = values.get("robust_per_class")
        if isinstance(robust, list):
            numbers |= class_numbers(f"{kind}/robust_per_class", robust, self.class_names)
        track(self.accelerator, numbers, step=step)

    def flush(self) -> None:
        """Write the lines that wait; each save does, so that a run that stops there has them."""
        if not self._waiting:
            return
        try:
            self._append("".join(self._waiting))
        except OSError as error:
            logger.error("%s could not be written: %s; the next line tries again", self.path, error)
        else:
            self._waiting.clear()

    def _append(self, text: str) -> None:
        # The folder may have been removed in the meantime.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            end = file.tell()
            try:
                file.write(text.encode())
                file.flush()
            except OSError:
                # Half a line would spoil the next one.
                file.truncate(end)
                raise

    def close(self) -> None:
        """Write what waits, and close the bar."""
        self.flush()
        self.bar.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a ``metrics.jsonl``; a last line that was cut off in writing is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


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

    ``step`` is the number of updates done before.

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
            f"--report_to {' '.join(names)} could not begin: {error}; fix that, or train with --report_to none "
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
        logger.exception("the tracker failed on the numbers of update %d; every number is in the output folder", step)


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
        logger.exception("the tracker failed while closing; every number is in metrics.jsonl")
        accelerator.state.destroy_process_group()
