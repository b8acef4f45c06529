"""Batches shared out over processes, each computed once: by one process, or by a run that was interrupted."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ham_hf.data import BatchRequest, Images, PixelBatch
from ham_hf.evaluation.partial_results import Outcome, PartialResults, partial_results

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Workplace:
    """Where and how an evaluation runs.

    Attributes:
        accelerator: shares the batches out and gathers the results.
        batch_size: images per batch and process; random numbers are drawn per batch.
        seed: of attacks and noise.
        output_dir: folder that keeps finished batches until `remove_partial_results`; None keeps none.
        show_progress: show bars on the local main process.
    """

    accelerator: Accelerator
    batch_size: int
    seed: int
    output_dir: Path | None = None
    show_progress: bool = False

    def kept(self, model: nn.Module, images: Images) -> PartialResults | None:
        """The finished batches of this model on this split, to be narrowed down by `keyed`; None if none are kept."""
        return None if self.output_dir is None else partial_results(self.output_dir, model, images)


def keyed(partial: PartialResults | None, settings: Mapping[str, object]) -> PartialResults | None:
    """The finished batches with these settings (JSON types), if any are kept."""
    return None if partial is None else partial.keyed(settings)


class SharedBatches:
    """The batches of one stage, for a loop on every process.

    ::

        for number, batch in shared.of(images):
            shared.add(number, outcome)
        total = shared.gather()

    Batches kept from an interrupted run are not computed again, and need not be visible to all processes: where every
    node has a disk of its own, each brings what it finds. Processes do not wait for each other inside of the loop.

    Args:
        stage: what is done, in the names of files and in the progress bar.
        rows: (n,) int64 rows of each batch, without overlap; the same on every process.
        shape: number S of results per row, and number N of rows that there are.
        place: where it runs.
        partial: where finished batches are kept; None keeps none.
    """

    def __init__(
        self,
        stage: str,
        rows: Sequence[Tensor],
        *,
        shape: tuple[int, int],
        place: Workplace,
        partial: PartialResults | None,
    ) -> None:
        self.stage, self.rows, self.accelerator, self.partial = stage, rows, place.accelerator, partial
        self.show_progress = place.show_progress and self.accelerator.is_local_main_process
        self._total = Outcome(torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.zeros(shape[0]))
        self._todo = list(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))
        if partial is not None and rows:
            self._todo = self._take_over(partial)

    def of(self, images: Images) -> Iterator[tuple[int, PixelBatch]]:
        """Numbers and images of the batches that this process computes."""
        requests = [BatchRequest(self.rows[number], None) for number in self._todo]
        batches = images.batches(requests, device=self.accelerator.device)
        yield from tqdm(
            zip(self._todo, batches, strict=True),
            total=len(requests),
            desc=self.stage,
            unit="batch",
            disable=not self.show_progress,
        )

    def add(self, number: int, outcome: Outcome) -> None:
        """Take, and keep, the outcome of the batch with this number; its seconds are those of this process."""
        outcome = Outcome(
            outcome.predictions.cpu(), outcome.margins.cpu(), outcome.seconds / self.accelerator.num_processes
        )
        self._fill_in(number, outcome)
        if self.partial is not None:
            self.partial.save(self.stage, number, self.rows[number], outcome)

    def gather(self) -> Outcome:
        """Predictions and margins (S, N), zero in rows of no batch, and seconds (S,), on the CPU of every process.

        Seconds are wall-clock time as the mean over processes, earlier parts of an interrupted run included.
        """
        # Each row is one process's: the others add zero to it.
        parts = (part.to(self.accelerator.device) for part in vars(self._total).values())
        return Outcome(*(self.accelerator.reduce(part, "sum").cpu() for part in parts))

    def _fill_in(self, number: int, outcome: Outcome) -> None:
        total, rows = self._total, self.rows[number]
        total.predictions[:, rows], total.margins[:, rows] = outcome.predictions, outcome.margins
        total.seconds.add_(outcome.seconds)

    def _take_over(self, partial: PartialResults) -> list[int]:
        """Fill in the kept batches that this process brings, and return the numbers of those that it computes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        found = [partial.load(self.stage, number, rows) for number, rows in enumerate(self.rows)]
        here = torch.tensor([batch is not None for batch in found], dtype=torch.int32, device=self.accelerator.device)
        holders = self.accelerator.gather(here[None]).cpu()  # (processes, batches)
        missing: list[int] = (holders.sum(0) == 0).nonzero().squeeze(1).tolist()
        if len(missing) < len(found) and self.accelerator.is_main_process:
            done = len(found) - len(missing)
            logger.info("%s: %d of %d batches are kept from an interrupted run", self.stage, done, len(found))
        # Of several processes that see the same file, the first brings it in.
        first = holders.argmax(0)
        for number, batch in enumerate(found):
            if batch is not None and int(first[number]) == rank:
                self._fill_in(number, batch)
        return missing[rank::world]
