"""Record the training data of a model, recognize it in a copy, and find its held-out images again.

The record has the source of the images, every setting that decides which of them are held out, and two fingerprints of
the training split: one of its labels, one of the pixels of a few images.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from ham_hf.data.decoding import CorruptImageError, EncodedImages, decode_or_explain

SAMPLED_IMAGES = 16
"""Images whose pixels are part of a fingerprint, evenly spread over the split (our choice)."""
STREAMED = "the training split was streamed, so its labels were not read before training"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Fingerprint of a split of images, which does not depend on its name.

    Attributes:
        num_images: of the split.
        labels: SHA-256 over the class names that occur and the label of every image, in order. It does not depend on
            the order in which classes are declared, nor on declared classes without an image.
        images: SHA-256 over the RGB pixels of ``SAMPLED_IMAGES`` images.
        ordered_by_class: whether all images of a class stand together; the labels then say no more than how many
            images each class has, which other data may have as well.
    """

    num_images: int
    labels: str
    images: str
    ordered_by_class: bool


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The training data of a model, as ``config.json`` and ``report.json`` record it.

    Attributes:
        dataset: Hub id, or name of a local folder without its path.
        revision: commit of a Hub dataset; None if it is not known.
        train_split: split that training and validation images are of.
        test_split: split of the test images; None if they were held out of ``train_split``.
        seed: of the validation part and of ``limit_train_examples``.
        validation_fraction: share of the training images held out, in [0, 1).
        test_fraction: share of ``train_split`` held out to test on where ``test_split`` is None, in (0, 1).
        limit_train_examples: stratified part that was taken of the training images, before validation was held out.
        dataset_streaming: whether training images were streamed; held out is then the beginning of every file.
        num_train_examples: of a stream whose files do not say it.
        num_images: images of ``train_split``, all parts together.
        fingerprint: `Fingerprint.labels` of ``train_split``; None if it is not known.
        fingerprint_missing: why it is not known; else None.
        image_fingerprint: `Fingerprint.images` of ``train_split``; None if it is not known.
    """

    dataset: str
    config_name: str | None
    revision: str | None
    train_split: str
    test_split: str | None
    image_column: str
    label_column: str
    seed: int
    validation_fraction: float
    test_fraction: float
    limit_train_examples: int | None
    dataset_streaming: bool
    num_train_examples: int | None
    skip_corrupt: bool
    num_images: int
    fingerprint: str | None
    fingerprint_missing: str | None
    image_fingerprint: str | None

    def record(self) -> dict[str, Any]:
        """The JSON object that `read_provenance` reads."""
        return asdict(self)

    def loading_settings(self, dataset_name: str) -> dict[str, Any]:
        """Arguments of `ham_hf.data.load_image_data` that give the same parts of the same data again.

        ``dataset_name`` is where the data is now: a Hub id or a folder. A folder has no revision.
        """
        on_hub = not Path(dataset_name).expanduser().exists() and dataset_name == self.dataset
        others = {"dataset", "config_name", "revision", "num_images"}
        return {
            "dataset_name": dataset_name,
            "dataset_config_name": self.config_name,
            "dataset_revision": self.revision if on_hub else None,
            **{
                name: value for name, value in asdict(self).items() if name not in others and "fingerprint" not in name
            },
        }

    def is_of(self, found: Fingerprint) -> bool:
        """Whether a split holds the same images as ``train_split``, whatever its name.

        Equal labels in the same order are enough, unless they are ordered by class: then the pixels decide.
        """
        if self.fingerprint is None or self.fingerprint != found.labels:
            return False
        return not found.ordered_by_class or self.image_fingerprint in (None, found.images)


def plain_name(dataset_name: str) -> str:
    """A dataset's name, without the path of a local folder: local paths are not published."""
    folder = os.path.expanduser(dataset_name)
    return Path(os.path.abspath(folder)).name if os.path.exists(folder) else dataset_name


def fingerprint_of(split: EncodedImages, class_names: Sequence[str]) -> Fingerprint:
    """Fingerprint of a whole split: its N images, of all rows in order, and the class names that its labels index."""
    return Fingerprint(
        num_images=len(split),
        labels=label_fingerprint(split.labels, class_names),
        images=_pixel_fingerprint(split),
        ordered_by_class=len(torch.unique_consecutive(split.labels)) == len(torch.unique(split.labels)),
    )


def label_fingerprint(labels: Tensor, class_names: Sequence[str]) -> str:
    """SHA-256 over the names that occur, sorted, and the (N,) labels as places in them, in hexadecimal digits."""
    present = sorted(torch.unique(labels).tolist(), key=lambda label: class_names[label])
    place = torch.zeros(len(class_names), dtype=torch.int64)
    place[present] = torch.arange(len(present))
    digest = hashlib.sha256(json.dumps([class_names[label] for label in present]).encode())
    digest.update(place[labels].numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _pixel_fingerprint(split: EncodedImages) -> str:
    digest = hashlib.sha256()
    sample = torch.linspace(0, len(split) - 1, min(SAMPLED_IMAGES, len(split)), dtype=torch.float64).round().long()
    for encoded in split.read(sample):
        try:
            image = decode_or_explain(encoded, 3, where="")
        except CorruptImageError:
            digest.update(b"unreadable")  # in every copy
            continue
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def read_provenance(record: object) -> Provenance:
    """Read what `Provenance.record` gave, without the keys that a newer version adds.

    ValueError names the key and the expected values.
    """
    names = {field.name for field in fields(Provenance)}
    if not isinstance(record, Mapping) or not names <= record.keys():
        missing = sorted(names - (record.keys() if isinstance(record, Mapping) else set()))
        raise ValueError(f"trained_on should be an object with the keys {', '.join(missing)}")
    for name in sorted(names):
        kinds = get_args(_KINDS[name]) or (_KINDS[name],)
        value, (least, limit) = record[name], _BOUNDS.get(name, (-math.inf, math.inf))
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if isinstance(value, bool):
            fits = bool in kinds
        elif fits and isinstance(value, int | float):
            fits = math.isfinite(value) and least <= value < limit
        if not fits:
            raise ValueError(f"trained_on.{name} is not what this package writes: {ascii(value)[:80]}")
    return Provenance(**{name: record[name] for name in names})


_KINDS = get_type_hints(Provenance)
_BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63),
    **dict.fromkeys(("validation_fraction", "test_fraction"), (0, 1)),
    **dict.fromkeys(("limit_train_examples", "num_train_examples", "num_images"), (1, 2**63)),
}
"""Least value, and the bound that the value stays below."""
