"""Finished batches of an evaluation, kept on the disk until all of it is finished, so that a kill loses one batch.

One small JSON file per batch, written under another name, flushed and renamed: it is there as a whole or not at all.
Files are filed under a key made of everything that decides the result (weights, network, images, attacks), so what
another model or another setting left behind is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ham_hf import __version__
from ham_hf.data.pixels import BatchRequest, Images
from ham_hf.files import atomic_write

logger = logging.getLogger(__name__)

PARTIAL_RESULTS = "evaluation-progress"
"""Folder in the output folder of a run."""
_LAYOUT = 2
"""Part of the key: files of another layout (1 had no margins) are not looked at."""
NUM_HASHED_IMAGES = 32
"""Images whose pixels are part of the key, spread over the split (our choice); labels are hashed in full."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What S evaluations ("clean", "pgd-20", ...) make of n rows.

    Attributes:
        predictions: (S, n) int64.
        margins: (S, n) float32, logit of the true class minus the largest other one; may be NaN or infinite.
        seconds: (S,) float32, wall-clock time.
    """

    predictions: Tensor
    margins: Tensor
    seconds: Tensor


@dataclass(frozen=True)
class PartialResults:
    """Finished batches of one evaluation.

    Attributes:
        folder: where the files of all evaluations are; made when the first one is written.
        key: of this evaluation.
    """

    folder: Path
    key: str

    def keyed(self, settings: Mapping[str, object]) -> PartialResults:
        """The finished batches that were computed with these settings (JSON types)."""
        text = json.dumps([self.key, settings], sort_keys=True)
        return replace(self, key=hashlib.sha256(text.encode()).hexdigest())

    def load(self, stage: str, number: int, rows: Tensor) -> Outcome | None:
        """The finished batch of a stage, or None if there is none with these rows (n,) int64."""
        path = self._path(stage, number)
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

    def save(self, stage: str, number: int, rows: Tensor, outcome: Outcome) -> None:
        """Keep the outcome, on the CPU, of a batch. If it cannot be written, the evaluation warns and continues."""
        path = self._path(stage, number)
        values = {name: values.tolist() for name, values in {"rows": rows, **vars(outcome)}.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(values))
        except OSError as error:
            # Losing the cached batch is cheaper than aborting the evaluation.
            logger.warning("%s cannot be written (%s): a rerun would attack this batch again", path, error)

    def _path(self, stage: str, number: int) -> Path:
        return self.folder / self.key[:16] / f"{stage}-{number:05d}.json"


def partial_results(output_dir: Path, model: nn.Module, images: Images) -> PartialResults:
    """The finished batches of evaluations of this model on this split, to be narrowed down with ``keyed``.

    Args:
        output_dir: output folder of the run.
        model: the unwrapped pixel model; its weights, buffers and structure are part of the key.
        images: the split; labels and some pixels are part of the key.
    """
    digest = hashlib.sha256(f"ham_hf {__version__}, layout {_LAYOUT}\n".encode())
    # Parts without a name of their own (functions) are shown with their address, which is another one every time.
    digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    digest.update(_bytes_of(images.labels))
    spread = torch.linspace(0, len(images) - 1, min(len(images), NUM_HASHED_IMAGES)).long()
    for batch in images.batches([BatchRequest(spread, None)], device=torch.device("cpu")):
        digest.update(f"\n{tuple(batch.x.shape)}\n".encode())
        digest.update(_bytes_of(batch.x))
    return PartialResults(output_dir / PARTIAL_RESULTS, digest.hexdigest())


def remove_partial_results(output_dir: Path) -> None:
    """Remove the finished batches of all evaluations in an output folder, once their report is written."""
    shutil.rmtree(output_dir / PARTIAL_RESULTS, ignore_errors=True)


def _bytes_of(tensor: Tensor) -> bytes:
    """Values in logical order, whatever the memory layout and the device."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy())
