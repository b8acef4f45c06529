"""Which examples an update trains on: the order of an epoch, and each process's part of it.

The order of an epoch follows from the seed and the epoch (and from the class state of a method that draws classes).
Its updates cut it into pieces of ``per_update`` examples; an update deals its piece out by accumulation step first and
process second. So update ``n`` of an epoch trains on the same examples with any number of processes and accumulation
steps, and a run that is resumed with others, in mid-epoch too, still sees every example once. Only which of them share
a batch changes, hence the noise of their attack and augmentation, and BatchNorm's batch statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ham_hf.data import Images, PixelBatch, TrainingStream, UpdateLayout
from ham_hf.methods import Method
from ham_hf.metrics import count_per_class
from ham_hf.seeding import Stream, make_generator


def epoch_order(labels: Tensor, seed: int, epoch: int, class_probabilities: Tensor | None = None) -> Tensor:
    """Positions of an epoch's examples (N,) in order, from their labels (N,): a permutation, or independent draws.

    With ``class_probabilities`` (num_classes,), a class is drawn, then one of its images, with replacement.
    """
    generator = make_generator(torch.device("cpu"), seed, Stream.DATA_ORDER, epoch)
    if class_probabilities is None:
        return torch.randperm(len(labels), generator=generator)
    counts = count_per_class(labels, len(class_probabilities)).clamp(min=1)
    of_example = (class_probabilities.cpu() / counts)[labels]
    return torch.multinomial(of_example, len(labels), replacement=True, generator=generator)


def epoch_batches(
    train: Images | TrainingStream,
    layout: UpdateLayout,
    *,
    epoch: int,
    first_update: int,
    class_probabilities: Tensor | None,
    device: torch.device,
) -> Iterator[PixelBatch]:
    """This process's batches of an epoch from an update on; a stream draws no classes."""
    if isinstance(train, TrainingStream):
        return train.batches(layout, epoch=epoch, first_update=first_update, device=device)
    order = epoch_order(train.labels, layout.seed, epoch, class_probabilities)
    return train.batches(layout.requests(order, epoch)[first_update * layout.accumulation :], device=device)


def training_class_counts(train: Images | TrainingStream, method: Method, num_classes: int) -> Tensor:
    """Number of training images of each class (num_classes,); NaN where a stream does not know and no method asks.

    Raises:
        ValueError: if a method asks for what cannot be known without reading all images.
    """
    if not isinstance(train, TrainingStream):
        return count_per_class(train.labels, num_classes)
    asking = [method.flag_of(rule) for rule in method.rules if rule.uses_class_counts]
    if not asking:
        return torch.full((num_classes,), torch.nan)
    counts = train.shards.class_counts()
    if counts is None:
        raise ValueError(
            f"{asking[0]} needs the number of training images of each class, and of .tar archives it is not "
            "known before all are read; stream parquet files, or leave --dataset_streaming out"
        )
    return counts
