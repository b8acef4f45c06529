"""What a run says while it runs: ``metrics.jsonl``, its trackers' numbers, and the progress bar."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ham_hf.files import atomic_write
from ham_hf.training.trackers import class_numbers, track

logger = logging.getLogger(__name__)


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
        self.path = output_dir / "metrics.jsonl"
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
