"""What a training run writes while it runs, on a disk that may be full, read-only or gone for a while."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ham_hf.training.checkpoint import (
    Checkpoint,
    CheckpointWriteError,
    has_best,
    list_checkpoints,
    save_best,
    save_checkpoint,
    space_needed,
)

logger = logging.getLogger(__name__)


class RunFiles:
    """Checkpoints and selected weights of one run; use it on the main process only.

    What cannot be written is an error in the log, and is tried again at the next save; training goes on.

    Args:
        output_dir: output folder of the run.
        keep: number of checkpoints to keep; None keeps all.
    """

    def __init__(self, output_dir: Path, keep: int | None) -> None:
        self.output_dir, self.keep = output_dir, keep
        self._waiting: tuple[dict[str, Tensor], Mapping[str, Any]] | None = None

    def select(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the selected weights; where that fails, keep a copy in memory until it is possible."""
        self._waiting = None
        try:
            save_best(self.output_dir, weights, state)
        except OSError as error:
            self._waiting = ({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, state)
            logger.error("the selected weights could not be written: %s; the next save tries again", error)

    def selection_is_lost(self) -> bool:
        """Whether the selected weights, written before, are neither on the disk nor in memory."""
        return self._waiting is None and not has_best(self.output_dir)

    def save(self, checkpoint: Checkpoint) -> CheckpointWriteError | None:
        """Write a checkpoint, after selected weights that still wait.

        Returns:
            Why it could not be written; None if it is on the disk.
        """
        try:
            if self._waiting is not None:
                self._write_waiting(*self._waiting, checkpoint)
            save_checkpoint(self.output_dir, checkpoint, keep=self.keep)
        except CheckpointWriteError as error:
            logger.error("%s; kept: %s; training goes on, and the next save tries again", error, self.kept())
            return error
        return None

    def _write_waiting(self, weights: dict[str, Tensor], state: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        try:
            save_best(self.output_dir, weights, state)
        except OSError as error:
            name = self.output_dir / f"checkpoint-{checkpoint.state['step']}"
            raise CheckpointWriteError(
                f"{name} could not be written, nor the selected weights, which come first: {error} "
                f"({space_needed(checkpoint, self.output_dir)})"
            ) from error
        self._waiting = None

    def kept(self) -> str:
        """The newest checkpoint on the disk, in words."""
        try:
            checkpoints = list_checkpoints(self.output_dir)
        except OSError as error:
            return f"unknown ({error})"
        return str(checkpoints[-1]) if checkpoints else "no checkpoint"
