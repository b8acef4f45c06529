"""Accuracy on corrupted images, per corruption and severity: shared over processes, resumable after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ham_hf.attacks import evaluation_mode, predicted
from ham_hf.data import Images, PixelBatch
from ham_hf.evaluation.batch_sharing import Outcome, SharedBatches, StopWatch, WorkingSize, Workplace
from ham_hf.evaluation.corruptions import corrupt
from ham_hf.evaluation.robustness import logits_of, true_margins


class CorruptionResult(NamedTuple):
    """One corruption of one severity: the images (N,) of a split that are right, not where logits are not finite.

    ``seconds`` is wall-clock time, corrupting included, the mean over processes.
    """

    name: str
    severity: int
    flags: Tensor
    seconds: float


def evaluate_corruptions(
    model: nn.Module, images: Images, names: Sequence[str], severities: Sequence[int], place: Workplace
) -> list[CorruptionResult]:
    """Classify every image of a split under each corruption at each severity.

    The seed of ``place`` is that of the corruptions' noise. There is one result per corruption and severity, in the
    order given; the same on every process.

    Raises:
        ValueError: for an unknown corruption or severity (`ham_hf.evaluation.corruptions`).
    """
    key, size, results = place.key(model, images), WorkingSize(place.batch_size), []
    for name in names:
        shared = SharedBatches(
            name,
            torch.split(torch.arange(len(images)), place.batch_size),
            shape=(len(severities), len(images)),
            place=place,
            key=key,
            settings={"corruptions": list(severities), "seed": place.seed},
        )
        with evaluation_mode(model):
            for index, batch in shared.of(images):
                shared.add(index, _classify(model, name, severities, batch, size=size, seed=place.seed))
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
