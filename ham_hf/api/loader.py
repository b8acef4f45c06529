"""Input of `evaluate` and `calibrate`: a DataLoader, any iterable of batches, or `ham_hf.data.Images`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ham_hf.attacks import check_batch, check_pixel_range, ordinary
from ham_hf.data import BatchRequest, Images, PixelBatch
from ham_hf.data.columns import LABEL_COLUMNS

Loader: TypeAlias = Iterable[Any] | Images
"""Batches (x, y), or mappings with "pixel_values" and "labels", of pixels (N, C, H, W) in [0, 1] and int64 labels."""


class HeldImages(Images):
    """Images ``x`` (N, C, H, W) in [0, 1] with ``labels`` (N,) int64, in memory, unchanged, on the CPU."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def relabeled(self, labels: Tensor) -> Images:
        return HeldImages(self.x, labels)

    def batches(self, requests: Sequence[BatchRequest], *, device: torch.device) -> Iterator[PixelBatch]:
        """See `Images.batches`; there is no augmentation."""
        for request in requests:
            rows = request.indices
            yield PixelBatch(x=self.x[rows].to(device), y=self.labels[rows].to(device), indices=rows)


class GroupReader:
    """A loader of mappings with "pixel_values", "labels" and ``column``; ``values``: the groups of the images so far.

    Groups are strings, whole numbers, booleans or None, or a tensor of them.
    """

    def __init__(self, loader: Loader, column: str) -> None:
        self.column, self.values = column, list[str | int | bool | None]()
        self._loader = loader
        self.dataset = getattr(loader, "dataset", None)

    def __iter__(self) -> Iterator[Any]:
        """The batches; ValueError for one that is not a mapping, lacks the key, or has other values or too few."""
        if isinstance(self._loader, Images):
            raise ValueError(f"group_column {self.column}: Images have no columns; give batches that are mappings")
        for batch in self._loader:
            if not isinstance(batch, Mapping) or self.column not in batch:
                listed = f"none, it is not a mapping: {type(batch).__name__}"
                if isinstance(batch, Mapping):
                    listed = ", ".join(map(repr, batch))
                raise ValueError(f"group_column {self.column}: a batch has no such key; its keys are {listed}")
            found = batch[self.column]
            values = found.tolist() if isinstance(found, Tensor) else list(found)
            if not all(value is None or isinstance(value, (str, int)) for value in values):
                raise ValueError(
                    f"group_column {self.column}: expected strings, whole numbers or booleans, got {found!r:.80}"
                )
            if len(values) != len(batch.get("labels", ())):
                raise ValueError(
                    f"group_column {self.column}: {len(values)} values for {len(batch.get('labels', ()))} labels"
                )
            self.values += values
            yield batch


def batches_of(loader: Loader, device: torch.device, batch_size: int) -> Iterator[PixelBatch]:
    """The batches of a loader on a device: pixels in [0, 1] and labels; ``batch_size`` is for `Images` alone."""
    if isinstance(loader, Images):
        parts = torch.split(torch.arange(len(loader)), batch_size)
        yield from loader.batches([BatchRequest(rows, None) for rows in parts], device=device)
        return
    first = 0
    for batch in loader:
        x, y = (ordinary(part).to(device) for part in _pair(batch))
        check_images(x, y)
        if not len(y):
            continue
        yield PixelBatch(x=x, y=y.long(), indices=torch.arange(first, first + len(y)))
        first += len(y)


def check_images(x: Tensor, y: Tensor) -> None:
    """Refuse what is no batch of pixels in [0, 1] and class numbers; it may be empty."""
    check_batch(x, y)
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"labels must be class numbers (int64), got {y.dtype}; mixed labels cannot be attacked")
    if len(y):
        check_pixel_range(x)


def held_images(loader: Loader) -> Images:
    """All images of a loader, in memory; ValueError if there is none, or if their sizes differ."""
    if isinstance(loader, Images):
        return loader
    batches = list(batches_of(loader, torch.device("cpu"), 1))
    if not batches:
        raise ValueError("the loader gave no batch")
    shapes = {tuple(batch.x.shape[1:]) for batch in batches}
    if len(shapes) > 1:
        raise ValueError(f"all images must have one shape, got {', '.join(map(str, sorted(shapes)))}")
    return HeldImages(torch.cat([batch.x.float() for batch in batches]), torch.cat([batch.y for batch in batches]))


def class_names_of(loader: Loader, given: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Names of the classes: given ones (ValueError unless one per logit), those of the dataset, or numbers."""
    if given is not None:
        if len(given) != num_classes:
            raise ValueError(f"class_names has {len(given)} names, but the model has {num_classes} logits")
        return tuple(map(str, given))
    dataset: Any = getattr(loader, "dataset", None)
    names: Any = getattr(dataset, "classes", None)
    if names is None:
        features = getattr(dataset, "features", None) or {}
        named = [column for column, feature in features.items() if getattr(feature, "names", None)]
        usual = [column for column in ("labels", *LABEL_COLUMNS) if column in features]
        column = usual[0] if usual else named[0] if len(named) == 1 else ""
        names = getattr(features.get(column), "names", None)
    if isinstance(names, (list, tuple)) and len(names) == num_classes:
        return tuple(map(str, names))
    return tuple(map(str, range(num_classes)))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 (whatever a loader gives)
    if isinstance(batch, Mapping):
        batch = (batch.get("pixel_values"), batch.get("labels"))
    parts = list(batch[:2]) if isinstance(batch, (tuple, list)) else []
    if len(parts) < 2 or not all(isinstance(part, Tensor) for part in parts):
        kinds = f" of {', '.join(type(part).__name__ for part in batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            'a batch must be two tensors, pixels and labels, or a mapping with "pixel_values" and "labels", got '
            f"{type(batch).__name__}{kinds}"
        )
    return parts[0], parts[1]
