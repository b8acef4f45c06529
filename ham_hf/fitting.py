"""A model of any origin on a dataset: its training data, its threat model, its logits in the dataset's order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel
from ham_hf.data import DataConfig, ImageData, load_image_data
from ham_hf.data.evaluation_data import TrainedOn
from ham_hf.data.provenance import Provenance, read_provenance
from ham_hf.evaluation.config import ThreatConfig, pixel_unit_problems
from ham_hf.models import LoadedModel
from ham_hf.models.pixel_model import imagenet_synsets
from ham_hf.reporting.formats import plain_text
from ham_hf.settings import ConfigError

logger = logging.getLogger(__name__)


def what_trained(loaded: LoadedModel) -> TrainedOn:
    """Return what is known about a model's training data.

    Raises:
        ValueError: if the record is damaged.
    """
    return TrainedOn(
        record=provenance_of(loaded),
        dataset=loaded.metadata.get("dataset"),
        test_fraction=loaded.metadata.get("test_fraction"),
        class_names=loaded.class_names,
    )


def find_validation_part(loaded: LoadedModel, config: DataConfig) -> ImageData:
    """The data of a model's training, held out just as in training; it never trained on ``validation``.

    Args:
        loaded: the model; its ``config.json`` records the split, the seed and the shares.
        config: where the data is now (``dataset_name``) and how it is decoded; which images are held out follows from
            the model's record alone.

    Raises:
        ValueError: if the model records nothing or held nothing out, settings ask for other images than its record, or
            the data is not what it was trained on.
    """
    trained = provenance_of(loaded)
    if trained is None:
        raise ValueError(
            "the model does not record which images its training run held out: name a split that it was not trained "
            "on with --calibration_split (or, with --allow_training_images, the training split)"
        )
    if trained.validation_fraction == 0:
        raise ValueError(
            "the model was trained with --validation_fraction 0, so it has seen every training image; choose a model "
            "that was trained with a held-out part"
        )
    settings = trained.loading_settings(config.dataset_name)
    seed = settings.pop("seed")
    given = (name for name, value in settings.items() if getattr(config, name) != value)
    if problems := list(config.idle(given, "--calibration_split")):
        raise ConfigError(problems)
    inputs = loaded.preprocessing
    data = load_image_data(
        replace(config, **settings), inputs, seed=seed, image_size=inputs.image_size, order=loaded.class_names or ()
    )
    known, found = data.provenance, data.fingerprint
    same = trained.is_of(found) if found is not None else trained.fingerprint is None  # a stream has none
    if known is None or known.num_images != trained.num_images or not same:
        raise ValueError(
            f"--dataset_name {config.dataset_name}: split {trained.train_split!r} is not what the model was trained "
            f"on, {trained.num_images} images of {trained.dataset}: number of images, labels or pixels differ; "
            "give that dataset, or a copy of it"
        )
    return data


def provenance_of(loaded: LoadedModel) -> Provenance | None:
    """Return the record of a model's training data; None if its ``config.json`` has none.

    Raises:
        ValueError: if the record is damaged.
    """
    record = loaded.metadata.get("trained_on")
    if record is None:
        return None
    try:
        return read_provenance(record)
    except ValueError as error:
        raise ValueError(f"the model's config.json is damaged: ham_hf.{error}") from error


def threat_model_of(config: ThreatConfig, loaded: LoadedModel, *, eval_step_size: float | None = None) -> ThreatModel:
    """Return the threat model asked for; by default the one the model was trained for, else linf 8/255.

    Raises:
        ValueError: if l2 is asked for, no epsilon, and the model was trained for something else; or if a length is on
            the 0..255 scale.
    """
    trained_norm, trained_epsilon = loaded.metadata.get("norm"), loaded.metadata.get("epsilon")
    norm = config.norm or trained_norm or "linf"
    problems = list(pixel_unit_problems(norm, epsilon=config.epsilon, eval_step_size=eval_step_size))
    if problems:
        raise ValueError("; ".join(problems))
    if config.epsilon is not None:
        return ThreatModel(norm, config.epsilon)
    if trained_epsilon is not None and norm == trained_norm:
        return ThreatModel(norm, float(trained_epsilon))
    if norm != "linf":
        raise ValueError(f"--norm {norm} needs --epsilon: there is no usual radius for it")
    return ThreatModel(norm, 8 / 255)


def num_logits(loaded: LoadedModel) -> int:
    """Return the number of classes that a model tells apart.

    Raises:
        ValueError: if it has no classifier.
    """
    found = int(loaded.model.backbone.num_classes)  # type: ignore[arg-type]  # timm's attribute
    if found < 1:
        raise ValueError("the model has no classifier, only features: train one on top of it first")
    return found


class ReorderedLogits(nn.Module):
    """A classifier whose logits are put into a different order of classes."""

    order: Tensor

    def __init__(self, model: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of pixels (N, C, H, W) in the new order."""
        logits: Tensor = self.model(x)
        return logits[:, self.order]


def align_classes(loaded: LoadedModel, class_names: Sequence[str]) -> tuple[nn.Module, str]:
    """Put the model's logits in the order of the dataset's classes; names that both have decide.

    Returns:
        The model, and ``by name``; ``subset``: by name, and the dataset has some of the model's classes only, so only
        their logits are attacked and decided over; or ``assumed``: names do not match, the orders are assumed equal.

    Raises:
        ValueError: if the dataset has a class that the model does not name while they share others at different
            places, or if they share none and their numbers differ.
    """
    names, number = loaded.class_names, num_logits(loaded)
    numbers, synsets = tuple(map(str, range(number))), imagenet_synsets(number)
    if names is None and set(class_names) == set(numbers):
        # Folders 0, 1, 10, 100, ... come sorted as text, where a model that names no classes counts (ImageNetV2).
        names = numbers
    if names is None and all(name in (synsets or ()) for name in class_names):
        names = synsets  # timm's models name no classes; ImageNet-A and ImageNet-R have 200 of the 1,000
    if names is not None and tuple(names) == tuple(class_names):
        return loaded.model, "by name"
    shared = set(names or ()) & set(class_names)
    lists = f"the model's: {_shown_names(names or ())}; the dataset's: {_shown_names(class_names)}"
    if names is not None and shared == set(class_names):
        twice = sorted(name for name in shared if names.count(name) > 1)
        if twice:
            raise ValueError(
                f"the model has {names.count(twice[0])} classes called {plain_text(twice[0])!r}, so the dataset's "
                f"cannot be matched by name ({lists}); evaluate it on the dataset it was trained for"
            )
        same = len(class_names) == number
        if not same:
            logger.warning(
                "the dataset has %d of the model's %d classes: attacked and decided over those alone",
                len(class_names),
                number,
            )
        order = [names.index(name) for name in class_names]
        return ReorderedLogits(loaded.model, order), "by name" if same else "subset"
    if number != len(class_names):
        raise ValueError(
            f"the model tells {number} classes apart and the dataset has {len(class_names)}"
            + (f", {len(class_names) - len(shared)} of which the model does not name" if names else "")
            + f" ({lists}); evaluate it on the dataset it was trained for, or name another --label_column"
        )
    if names is None:
        logger.warning("the model does not name its classes: taking them to be in the order of the dataset's")
        return loaded.model, "assumed"
    moved = [name for name, own in zip(class_names, names, strict=True) if name in shared and name != own]
    unknown = [name for name in class_names if name not in shared]
    if moved:
        raise ValueError(
            f"the dataset's class {plain_text(unknown[0])!r} is none of the model's, and they share others at "
            f"different places, such as {plain_text(moved[0])!r}, so the order cannot be assumed ({lists}); give "
            "the dataset's classes the model's names"
        )
    logger.warning(
        "the model calls its classes %s, the dataset %s: taking them to be in the same order",
        ", ".join(map(plain_text, names[:5])),
        ", ".join(map(plain_text, class_names[:5])),
    )
    return loaded.model, "assumed"


def _shown_names(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 12 else ""
    return ", ".join(map(plain_text, names[:12])) + more if names else "not named"
