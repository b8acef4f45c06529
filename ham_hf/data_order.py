"""Which examples an update trains on: the order of an epoch, and each process's part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ham_hf.data import BatchRequest
from ham_hf.metrics import count_per_class
from ham_hf.seeding import Stream, derive_seed, make_generator


def epoch_order(labels: Tensor, seed: int, epoch: int, class_probabilities: Tensor | None = None) -> Tensor:
    """Positions of an epoch's examples (N,) in order: a permutation, or independent draws.

    Args:
        labels: (N,) labels of the training images.
        seed: the run's seed.
        epoch: 0-based epoch.
        class_probabilities: (num_classes,); draw a class, then one of its images, with replacement. None permutes.
    """
    generator = make_generator(torch.device("cpu"), seed, Stream.DATA_ORDER, epoch)
    if class_probabilities is None:
        return torch.randperm(len(labels), generator=generator)
    counts = count_per_class(labels, len(class_probabilities)).clamp(min=1)
    of_example = (class_probabilities.cpu() / counts)[labels]
    return torch.multinomial(of_example, len(labels), replacement=True, generator=generator)


def batch_requests(
    order: Tensor, *, batch_size: int, per_update: int, world: int, rank: int, seed: int, epoch: int
) -> list[BatchRequest]:
    """A process's batches of an epoch, one per accumulation step.

    Every update takes the next ``per_update`` examples of ``order``, whatever the number of processes; the last
    incomplete update is left out.
    """
    whole = len(order) // per_update * per_update
    mine = order[:whole].view(-1, world, batch_size)[:, rank]
    return [
        BatchRequest(indices, derive_seed(seed, Stream.AUGMENTATION, epoch, number, rank))
        for number, indices in enumerate(mine)
    ]
