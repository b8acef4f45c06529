"""Accuracy on corrupted images, per corruption and severity: shared over processes, resumable after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ham_hf.attacks import evaluation_mode, predicted
from ham_hf.data import Images, PixelBatch
from ham_hf.evaluation.batch_sharing import SharedBatches, StopWatch
from ham_hf.evaluation.corruptions import check_corruption, corrupt
from ham_hf.evaluation.partial_results import Outcome, PartialResults
from ham_hf.evaluation.robustness import logits_of, true_margins
from ham_hf.evaluation.working_size import WorkingSize


@dataclass(frozen=True, eq=False, kw_only=True)
class CorruptionResult:
    """Outcome of one corruption of one severity on every image of a split.

    Attributes:
        name: of the corruption.
        severity: 1 to 5.
        flags: (N,) bool, CPU: the corrupted image is classified correctly; not where its logits are not finite.
        seconds: wall-clock time, corrupting included, the mean over processes.
    """

    name: str
    severity: int
    flags: Tensor
    seconds: float


def evaluate_corruptions(
    model: nn.Module,
    images: Images,
    names: Sequence[str],
    severities: Sequence[int],
    *,
    num_channels: int,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    partial: PartialResults | None = None,
    show_progress: bool = False,
) -> list[CorruptionResult]:
    """Classify every image of a split under each corruption at each severity.

    Args:
        model: the unwrapped pixel model.
        images: the split.
        names: of the corruptions, see `ham_hf.evaluation.corruptions`.
        severities: 1 to 5.
        num_channels: of the images.
        accelerator: shares the batches out and gathers the flags.
        batch_size: images per batch and process.
        seed: of the corruptions' noise.
        partial: where finished batches of this model and split are kept; None keeps none.
        show_progress: show a bar on the local main process.

    Returns:
        One result per corruption and severity, in the order given; the same on every process.

    Raises:
        ValueError: for an unknown corruption or severity.
    """
    for name in names:
        for severity in severities:
            check_corruption(name, severity, num_channels=num_channels)
    if partial is not None:
        partial = partial.keyed({"corruptions": list(severities), "seed": seed, "batch_size": batch_size})
    size, results = WorkingSize(batch_size), []
    for name in names:
        shared = SharedBatches(
            name,
            torch.split(torch.arange(len(images)), batch_size),
            shape=(len(severities), len(images)),
            accelerator=accelerator,
            partial=partial,
            show_progress=show_progress,
        )
        with evaluation_mode(model):
            for index, batch in shared.of(images):
                shared.add(index, _classify(model, name, severities, batch, size=size, seed=seed))
        outcome = shared.gather()
        for number, severity in enumerate(severities):
            flags, seconds = outcome.predictions[number] == images.labels, float(outcome.seconds[number])
            results.append(CorruptionResult(name=name, severity=severity, flags=flags, seconds=seconds))
    return results


def _classify(
    model: nn.Module, name: str, severities: Sequence[int], batch: PixelBatch, *, size: WorkingSize, seed: int
) -> Outcome:
    """Predictions and margins (severities, B) of a batch under one corruption."""
    watch, found, margins, seconds = StopWatch(batch.x.device), [], [], []
    for severity in severities:
        x = corrupt(batch.x, name, severity, seed=seed, indices=batch.indices)
        logits = size.split(lambda rows, x=x: logits_of(model, x[rows]), len(x))  # type: ignore[misc]
        found.append(predicted(logits))
        margins.append(true_margins(logits, batch.y))
        seconds.append(watch.lap())
    return Outcome(torch.stack(found), torch.stack(margins), torch.tensor(seconds))
