"""The last layer of a timm classifier, and one number per class added to its logits by way of that layer's bias.

A shift of the logits in the bias costs nothing at inference, and the network stays the plain timm architecture that it
was. Where a model ends in several heads whose logits timm averages (distilled ones), each takes the whole shift. That
the folded network computes the shifted logits is not assumed but tried, for every model, on random pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ham_hf.models.pixel_model import PixelModel, compare_logits

SHIFTED_LOGITS_TOLERANCE = 1e-5
"""Largest difference between folded logits and logits plus shift, relative to the largest logit, or to 1 if that is
smaller."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class HeadError(ValueError):
    """A classifier whose logits cannot be shifted by its bias."""


def final_layers(backbone: nn.Module, num_classes: int) -> tuple[nn.Module, ...]:
    """The layers that make the logits: of each head that timm's ``get_classifier()`` names, the last Linear or Conv.

    A head may be a layer, a module that ends in one (norm and linear, MLP), or several of them (distilled heads).

    Raises:
        HeadError: naming the architecture and the head, where there is no such layer or it has no bias.
    """
    name = architecture_name(backbone)
    found = list(_heads(backbone))
    if not found:
        raise HeadError(f"{name}: timm names no classifier head, so there is no bias to shift")
    layers = []
    for head in found:
        last = [layer for layer in head.modules() if isinstance(layer, _LAYERS)][-1:]
        if not last or last[0].weight.shape[0] != num_classes:
            raise HeadError(
                f"{name}: its head, {type(head).__name__}, does not end in a Linear or Conv of {num_classes} outputs, "
                "so there is no bias to shift"
            )
        if last[0].bias is None:
            raise HeadError(
                f"{name}: the {type(last[0]).__name__} that makes its logits has no bias to shift; train it with one"
            )
        layers.append(last[0])
    return tuple(layers)


def read_biases(backbone: nn.Module, num_classes: int) -> list[list[float]]:
    """The bias of each of the `final_layers`; exact in JSON, as a float32 number is one of 64 bits."""
    return [bias.tolist() for bias in _biases(backbone, num_classes)]


def write_biases(backbone: nn.Module, biases: Sequence[Sequence[float]]) -> None:
    """Put back what `read_biases` read, in place; HeadError if the model has other heads."""
    num_classes = len(biases[0]) if biases else 0
    found = _biases(backbone, num_classes)
    if [len(bias) for bias in biases] != [len(bias) for bias in found]:
        raise HeadError(
            f"{architecture_name(backbone)}: a recorded bias of {[len(bias) for bias in biases]} numbers does not fit "
            f"the model's of {[len(bias) for bias in found]}"
        )
    with torch.no_grad():
        for bias, values in zip(found, biases, strict=True):
            bias.copy_(torch.tensor(values, dtype=bias.dtype))


def fold_shifts(backbone: nn.Module, shifts: Tensor) -> None:
    """Add ``shifts`` (num_classes,) to the logits of a model by adding them to its bias, in place.

    A class whose shift is zero keeps its bias bit for bit. HeadError, with nothing changed, where there is no bias.
    """
    biases = _biases(backbone, len(shifts))
    with torch.no_grad():
        for bias in biases:
            added = shifts.to(bias)
            bias.copy_(torch.where(added == 0, bias, bias + added))


def check_foldable(model: PixelModel, *, num_classes: int, image_size: int) -> None:
    """Try on a copy whether a shift of the bias shifts the logits by as much; costs two passes over two images.

    HeadError names the architecture where it does not.
    """
    final_layers(model.backbone, num_classes)
    shifts = torch.linspace(-1, 1, num_classes)
    original, folded = (copy.deepcopy(model).cpu().float().eval() for _ in range(2))
    fold_shifts(folded.backbone, shifts)
    check_shifted_logits(original, folded, shifts, image_size)


def check_shifted_logits(original: PixelModel, folded: PixelModel, shifts: Tensor, image_size: int) -> None:
    """Compare a folded model with the original plus ``shifts`` (num_classes,) on random pixels, in evaluation mode.

    HeadError if their logits differ by more than `SHIFTED_LOGITS_TOLERANCE`.
    """
    difference, largest = compare_logits(original, folded, image_size, shifts.to(original.mean))
    # Written so that NaN fails.
    if not difference <= SHIFTED_LOGITS_TOLERANCE * max(1.0, largest):
        raise HeadError(
            f"{architecture_name(original.backbone)}: with a shift in its bias the logits differ by {difference:.2g} "
            f"from the shifted ones (the largest logit is {largest:.2g}), so this head cannot be calibrated"
        )


def architecture_name(backbone: nn.Module) -> str:
    """The architecture's name by timm, or the class of the module."""
    cfg: Any = getattr(backbone, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(backbone).__name__)


def _heads(backbone: nn.Module) -> Iterator[nn.Module]:
    get_classifier: Callable[[], Any] | None = getattr(backbone, "get_classifier", None)
    if get_classifier is None:
        return
    found = get_classifier()
    several = isinstance(found, Iterable) and not isinstance(found, nn.Sequential)
    for head in found if several else [found]:
        if isinstance(head, nn.Module):
            # RepViT names one module, which averages the two in it.
            inner = [head._modules[name] for name in ("head", "head_dist") if name in head._modules]
            yield from (one for one in inner if one is not None) if len(inner) == 2 else [head]


def _biases(backbone: nn.Module, num_classes: int) -> list[Tensor]:
    biases: list[Tensor] = [layer.bias for layer in final_layers(backbone, num_classes)]  # type: ignore[misc]
    return biases
