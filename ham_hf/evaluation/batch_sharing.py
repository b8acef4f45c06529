"""Batches shared out over processes, each computed once: by one process, or by a run that was interrupted.

Finished batches are kept on the disk until all of an evaluation is finished, so that a kill loses one batch: one small
JSON file per batch, written under a temporary name, flushed and renamed: it is complete or absent. Files are
filed under a key made of everything that decides the result (weights, network, images, attacks), so results of another
model or another setting are never reused.

The number of images that a device takes at once is found by trying: it is halved after every out-of-memory error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ham_hf import __version__
from ham_hf.artifacts import PARTIAL_RESULTS
from ham_hf.data import BatchRequest, Images, PixelBatch
from ham_hf.faults import is_out_of_memory
from ham_hf.files import atomic_write

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LAYOUT = 2
"""Part of the key: files of a different layout (1 had no margins) are ignored."""
NUM_HASHED_IMAGES = 32
"""Images whose pixels are part of the key, spread over the split (our choice); labels are hashed in full."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Results of S evaluations ("clean", "pgd-20", ...) on n rows.

    Attributes:
        predictions: (S, n) int64.
        margins: (S, n) float32, logit of the true class minus the largest other one; may be NaN or infinite.
        seconds: (S,) float32, wall-clock time.
    """

    predictions: Tensor
    margins: Tensor
    seconds: Tensor


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

    def key(self, model: nn.Module, images: Images) -> str:
        """Key of the finished batches of this unwrapped model on this split; empty if none are kept."""
        if self.output_dir is None:
            return ""
        digest = hashlib.sha256(f"ham_hf {__version__}, layout {_LAYOUT}\n".encode())
        # Parts without a name of their own (functions) are shown with their address, which differs every time.
        digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)).encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes_of(tensor))
        digest.update(_bytes_of(images.labels))
        spread = torch.linspace(0, len(images) - 1, min(len(images), NUM_HASHED_IMAGES)).long()
        for batch in images.batches([BatchRequest(spread, None)], device=torch.device("cpu")):
            digest.update(f"\n{tuple(batch.x.shape)}\n".encode())
            digest.update(_bytes_of(batch.x))
        return digest.hexdigest()


def remove_partial_results(output_dir: Path) -> None:
    """Remove the finished batches of all evaluations in an output folder, once their report is written."""
    shutil.rmtree(output_dir / PARTIAL_RESULTS, ignore_errors=True)


def _bytes_of(tensor: Tensor) -> bytes:
    """Values in logical order, whatever the memory layout and the device."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy())


class SharedBatches:
    """The batches of one stage, for a loop on every process.

    ::

        for number, batch in shared.of(images):
            shared.add(number, outcome)
        total = shared.gather()

    Batches kept from an interrupted run are not computed again, and need not be visible to all processes: where every
    node has a disk of its own, each brings what it finds. Processes do not wait for each other inside of the loop.

    Args:
        stage: name of the stage, in the names of files and in the progress bar.
        rows: (n,) int64 rows of each batch, without overlap; the same on every process.
        shape: number S of results per row, and number N of rows that there are.
        place: where it runs.
        key: of model and images, see `Workplace.key`.
        settings: what else decides the results; JSON types only.
    """

    def __init__(
        self,
        stage: str,
        rows: Sequence[Tensor],
        *,
        shape: tuple[int, int],
        place: Workplace,
        key: str,
        settings: Mapping[str, object],
    ) -> None:
        self.stage, self.rows, self.accelerator = stage, rows, place.accelerator
        self.folder = None
        if place.output_dir is not None:
            text = json.dumps([key, {**settings, "batch_size": place.batch_size}], sort_keys=True)
            self.folder = place.output_dir / PARTIAL_RESULTS / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.show_progress = place.show_progress and self.accelerator.is_local_main_process
        self._total = Outcome(torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.zeros(shape[0]))
        self._todo = list(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))
        if self.folder is not None and rows:
            self._todo = self._take_over(self.folder)

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
        if self.folder is not None:
            _save(self._path(self.folder, number), self.rows[number], outcome)

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

    def _path(self, folder: Path, number: int) -> Path:
        return folder / f"{self.stage}-{number:05d}.json"

    def _take_over(self, folder: Path) -> list[int]:
        """Fill in the kept batches that this process brings, and return the numbers of those that it computes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        found = [_load(self._path(folder, number), rows) for number, rows in enumerate(self.rows)]
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


def _load(path: Path, rows: Tensor) -> Outcome | None:
    """The finished batch in a file, or None if there is none with these rows (n,) int64."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        kept_rows = torch.tensor(read["rows"])
        found = Outcome(
            torch.tensor(read["predictions"]),
            torch.tensor(read["margins"], dtype=torch.float32),
            torch.tensor(read["seconds"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s): attacking this batch again", path, error)
        return None
    return found if torch.equal(kept_rows, rows) else None


def _save(path: Path, rows: Tensor, outcome: Outcome) -> None:
    values = {name: values.tolist() for name, values in {"rows": rows, **vars(outcome)}.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(values))
    except OSError as error:
        # Losing the cached batch is cheaper than aborting the evaluation.
        logger.warning("%s cannot be written (%s): a rerun would attack this batch again", path, error)


class WorkingSize:
    """The largest number of images (>= 1) that went through a model at once, so far; it begins with ``rows``.

    Each process has its own: others may have more memory left, and do not wait.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def split(self, function: Callable[[slice], Tensor], num: int) -> Tensor:
        """Results (n, ...) of ``function``, which is given rows, for ``num`` rows (>= 1) in pieces that fit, in order.

        If a single row does not fit, the allocator's error passes.
        """
        results: list[Tensor] = []
        start = 0
        while start < num:
            stop = min(start + self.rows, num)
            piece = self._attempt(partial(function, slice(start, stop)), stop - start)
            if piece is not None:
                results.append(piece)
                start = stop
        return results[0] if len(results) == 1 else torch.cat(results)

    def whole(self, function: Callable[[], T], num: int) -> T:
        """Result of ``function``, which sends ``num`` rows through a `PiecewiseModel`; tried again likewise."""
        while True:
            result = self._attempt(function, min(self.rows, num))
            if result is not None:
                return result

    def _attempt(self, function: Callable[[], T], num: int) -> T | None:
        """The result, or None if memory did not suffice for ``num`` rows; from then on, it is half of them."""
        try:
            return function()
        except (RuntimeError, MemoryError) as error:
            if num == 1 or not is_out_of_memory(error):
                raise
        # Only here, as the error holds on to the tensors of the failed attempt.
        self.rows = num // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(
            "out of memory with %d images at once: continuing with %d (--per_device_eval_batch_size %d would start "
            "with that, but draws other random starts)",
            num,
            self.rows,
            self.rows,
        )
        return None


class PiecewiseModel(nn.Module):
    """A model that takes batches of any size in pieces of the working size.

    For attacks of others, which draw their noise for the whole batch. With more than one piece, activations are
    computed again for the gradient, so that those of one piece are held at a time; a gradient then costs about a
    third more. Logits and gradients are those of the model, in which a row does not depend on the others.
    """

    def __init__(self, model: nn.Module, size: WorkingSize) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        logits: Tensor
        if len(x) <= self.size.rows:
            logits = self.model(x)
            return logits
        parts = torch.split(x, self.size.rows)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.cat([self.model(part) for part in parts])
        return torch.cat(
            [checkpoint(self.model, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )
