"""Batches shared out over processes, each computed once: by one process, or by a run that was interrupted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ham_hf.evaluation.partial_results import FinishedBatch, PartialResults

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What S evaluations make of n rows.

    Attributes:
        predictions: (S, n) int64.
        margins: (S, n) float32, logit of the true class minus the largest other one; NaN where there is none.
        seconds: (S,) float32.
    """

    predictions: Tensor
    margins: Tensor
    seconds: Tensor


Compute = Callable[[Sequence[tuple[int, Tensor]]], Iterable[Outcome]]
"""Given numbers and rows (n,) of batches, makes the outcome of each, in order."""


class StopWatch:
    """Wall-clock time on a device: reading it waits until the device has finished its queue."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        before, self._since = self._since, time.perf_counter()
        return self._since - before


def share_batches(
    stage: str,
    batches: Sequence[Tensor],
    compute: Compute,
    *,
    shape: tuple[int, int],
    accelerator: Accelerator,
    partial: PartialResults | None = None,
    show_progress: bool = False,
) -> Outcome:
    """Compute batches on all processes, but for those that are kept from an interrupted run.

    Processes do not wait for each other between batches. Kept batches need not be visible to all of them: where every
    node has a disk of its own, each brings what it finds.

    Args:
        stage: what is done, in the names of files and in the progress bar.
        batches: rows (n,) int64 of each batch, without overlap; the same on every process.
        compute: makes the results of some of them, one by one.
        shape: number S of results per row, and number N of rows that ``batches`` refer to.
        accelerator: one or several processes.
        partial: where finished batches are kept; None keeps none.
        show_progress: show a bar on the local main process.

    Returns:
        Predictions and margins (S, N), zero in rows of no batch, and seconds (S,): wall-clock time as the mean over
        processes, earlier parts of an interrupted run included. On the CPU, the same on every process.
    """
    predictions, margins, seconds = torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.zeros(shape[0])
    if not batches:
        return Outcome(predictions, margins, seconds)
    kept, todo = _agree(stage, batches, accelerator, partial)
    for batch in kept:
        predictions[:, batch.rows], margins[:, batch.rows] = batch.predictions, batch.margins
        seconds += batch.seconds
    results = compute([(number, batches[number]) for number in todo])
    bar = tqdm(
        zip(todo, results, strict=True),
        total=len(todo),
        desc=stage,
        unit="batch",
        disable=not (show_progress and accelerator.is_local_main_process),
    )
    for number, found in bar:
        spent = found.seconds / accelerator.num_processes
        batch = FinishedBatch(batches[number], found.predictions.cpu(), found.margins.cpu(), spent)
        predictions[:, batch.rows], margins[:, batch.rows] = batch.predictions, batch.margins
        seconds += batch.seconds
        if partial is not None:
            partial.save(stage, number, batch)
    # Each row is one process's: the others add zero to it.
    parts = (accelerator.reduce(part.to(accelerator.device), "sum") for part in (predictions, margins, seconds))
    return Outcome(*(part.cpu() for part in parts))


def _agree(
    stage: str, batches: Sequence[Tensor], accelerator: Accelerator, partial: PartialResults | None
) -> tuple[list[FinishedBatch], list[int]]:
    """The kept batches that this process brings in, and the numbers of those that it computes."""
    world, rank = accelerator.num_processes, accelerator.process_index
    if partial is None:
        return [], list(range(rank, len(batches), world))
    found = [partial.load(stage, number, rows) for number, rows in enumerate(batches)]
    here = torch.tensor([batch is not None for batch in found], dtype=torch.int32, device=accelerator.device)
    holders = accelerator.gather(here[None]).cpu()  # (processes, batches)
    missing = (holders.sum(0) == 0).nonzero().squeeze(1).tolist()
    if len(missing) < len(batches) and accelerator.is_main_process:
        done = len(batches) - len(missing)
        logger.info("%s: %d of %d batches are kept from an interrupted run", stage, done, len(batches))
    # Of several processes that see the same file, the first brings it in.
    first = holders.argmax(0)
    mine = [batch for number, batch in enumerate(found) if batch is not None and int(first[number]) == rank]
    return mine, missing[rank::world]
