"""Any timm backbone for any number of classes and image size, and the model that normalizes inside.

Attacks, epsilon and data live in pixel space: a tensor ``x`` is (N, C, H, W) in [0, 1], and only
:class:`PixelModel` knows mean and standard deviation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ham_hf.models.config import ModelConfig
from ham_hf.models.source import TRAINED_FORM_KEY, ModelSource, complete_name, resolve_source
from ham_hf.models.untrusted import (
    CROP_MODES,
    INTERPOLATIONS,
    MAX_CROP_PCT,
    MIN_CROP_PCT,
    BuildLimit,
    check_model_args,
)

if TYPE_CHECKING:
    from ham_hf.data import ImageData

logger = logging.getLogger(__name__)

# Arguments of timm.create_model that have their own flag, or none on purpose.
_RESERVED_ARGUMENTS = {
    "num_classes": "it is the number of classes of the dataset",
    "img_size": "use --image_size",
    "pretrained": "use --pretrained",
    "checkpoint_path": "start from a folder or Hub model with --model_name local-dir:... or hf-hub:...",
    "pretrained_cfg": "name the weights in --model_name, as in resnet18.a1_in1k",
    "pretrained_cfg_overlay": "name the weights in --model_name, as in resnet18.a1_in1k",
    "features_only": "a classifier is trained here",
}
# What timm's constructors raise on arguments or sizes that do not fit.
_BUILD_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, LookupError, ArithmeticError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the input of a backbone.

    Attributes:
        image_size: side of the square input in pixels, >= 1.
        in_chans: number of channels, >= 1.
        interpolation: resampling of the resize, by timm's names ("bilinear", "bicubic", "nearest", ...).
        crop_pct: side of the input by the side that images are resized to, in [0.01, 2]; above 1, timm pads.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1], > 0.
        crop_mode: which sides are resized, by timm's names: the shorter one ("center"), the longer one, with borders
            of the color ``mean`` ("border"), or both ("squash").

    Raises:
        ValueError: if a value is out of range, or there is not one mean and one standard deviation per channel.
    """

    image_size: int
    in_chans: int
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.in_chans < 1 or not MIN_CROP_PCT <= self.crop_pct <= MAX_CROP_PCT:
            raise ValueError(
                f"expected image_size >= 1, in_chans >= 1 and crop_pct in [{MIN_CROP_PCT}, {MAX_CROP_PCT}], "
                f"got {self.image_size}, {self.in_chans} and {self.crop_pct}"
            )
        if self.image_size < self.crop_pct:
            raise ValueError(f"crop_pct {self.crop_pct} leaves nothing of an image of side {self.image_size}")
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(f"expected {self.in_chans} means and standard deviations, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"expected standard deviations > 0, got {self.std}: a channel of the data is constant")


class PixelModel(nn.Module):
    """A classifier of pixels: (N, C, H, W) in [0, 1] to (N, num_classes) logits.

    The only place where pixels are normalized, in the precision of ``x``: under autocast, only the backbone computes
    in bf16. Mean and standard deviation are buffers that follow the module to its device, but are not part of the
    state dict, whose keys are those of the backbone behind ``backbone.``.

    Args:
        backbone: maps normalized images to logits.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        upsample: nearest-neighbor enlargement per side in front of the backbone; gradients and perturbations stay
            in the small pixel space.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], upsample: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.upsample = upsample
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, num_classes), of pixels ``x``, (N, C, H, W) in [0, 1]."""
        x = (x - self.mean) / self.std
        if self.upsample != 1:
            x = F.interpolate(x, scale_factor=self.upsample, mode="nearest")
        logits: Tensor = self.backbone(x)
        return logits


@torch.no_grad()
def compare_logits(
    expected: PixelModel, found: PixelModel, image_size: int, shifts: Tensor | float = 0.0
) -> tuple[float, float]:
    """Run two models on two random images; gray ones are given to ``found`` in as many channels as it takes.

    Returns:
        The largest difference between logits of ``found`` and those of ``expected`` plus ``shifts`` (num_classes,),
        and the largest logit of ``expected``; NaN where a logit is.
    """
    shape = (2, expected.mean.shape[1], image_size, image_size)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    logits = expected(x)
    difference = found(x.expand(-1, found.mean.shape[1], -1, -1)) - (logits + shifts)
    return difference.abs().max().item(), logits.abs().max().item()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for evaluation.

    Attributes:
        model: in eval mode, on the CPU, float32; its pixel space is the one it was trained in.
        preprocessing: how an image becomes pixels for it.
        class_names: one per logit, in order; None if the source does not name them.
        metadata: passed to ``export_for_timm``; empty for models of other origin.
        notes: sentences that a reader of results has to know.
    """

    model: PixelModel
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()


def input_defaults(model_name: str, *, model_args: Mapping[str, object]) -> Preprocessing:
    """Input size, resampling, mean and standard deviation that go with a model's weights.

    Args:
        model_name: a timm name, ``local-dir:PATH`` or ``hf-hub:OWNER/NAME``.
        model_args: further arguments of the architecture; ``in_chans`` among them sets the number of channels.

    Raises:
        ValueError: if there is no such model (with the nearest names), or its input is not square.
    """
    source = resolve_source(model_name).as_trained()
    return preprocessing_of(source.name, source.pretrained_cfg, model_args.get("in_chans"))


def create_backbone(
    model_name: str,
    *,
    pretrained: bool,
    num_classes: int,
    preprocessing: Preprocessing,
    model_args: Mapping[str, object],
) -> nn.Module:
    """Build a timm classifier for the given classes and input, and try it on one image of that size.

    A CIFAR network that this package exported as plain ``resnet18`` is built as it was trained.

    Args:
        model_name: a timm name, ``local-dir:PATH`` or ``hf-hub:OWNER/NAME``.
        pretrained: load its weights; the classifier is new if the number of classes differs.
        num_classes: number of logits.
        preprocessing: image size and channels; the size reaches architectures whose geometry depends on it.
        model_args: further arguments of the architecture, as for ``timm.create_model``.

    Returns:
        The bare timm module in train mode, on the CPU; it takes normalized images.

    Raises:
        ValueError: if there is no such model, no safetensors weights for it, or it cannot be built with these
            arguments or run on this size; the message names the setting.
    """
    source = resolve_source(model_name).as_trained()
    _check_arguments(model_args, preprocessing)
    size, default_size = preprocessing.image_size, source.pretrained_cfg["input_size"][-1]
    arguments = {**source.model_args, **model_args, "num_classes": num_classes, "in_chans": preprocessing.in_chans}
    if source.pretrained_cfg.get("fixed_input_size"):
        arguments["img_size"] = size
    weights = source.read_weights() if pretrained else None
    try:
        backbone = _build(source, arguments, weights)
    except _BUILD_ERRORS as error:
        raise ValueError(
            f"--model_name {model_name} cannot be built with --model_args {dict(model_args)} for {size}x{size} images "
            f"and {preprocessing.in_chans} channels: {error}"
        ) from error
    try:
        with torch.no_grad():
            shape = tuple(backbone.eval()(torch.zeros(1, preprocessing.in_chans, size, size)).shape)
        backbone.train()
    except _BUILD_ERRORS as error:
        raise ValueError(
            f"--model_name {model_name} does not run on {size}x{size} images: {error}. Raise --image_size (default "
            f"{default_size}) or choose a finer geometry with --model_args, such as patch_size=4 for a ViT, "
            f"patch_size=2 window_size=4 for a Swin, output_stride=8 for a ResNet"
        ) from error
    if shape != (1, num_classes):
        raise ValueError(f"--model_name {model_name} is not a classifier: it gave {shape}, not (1, {num_classes})")
    return backbone


def data_preprocessing(data: ImageData, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    """How the images of ``data`` were prepared, with these statistics of the channels."""
    prepared = ("image_size", "in_chans", "interpolation", "crop_pct", "crop_mode")
    return Preprocessing(mean=mean, std=std, **{name: getattr(data, name) for name in prepared})


def new_model(config: ModelConfig, data: ImageData, *, seed: int) -> tuple[PixelModel, Preprocessing]:
    """A model to train, the same on every process.

    Pretrained weights keep the mean and standard deviation they were trained with; a new network gets the data's,
    unless images are brought to their size with borders of the mean color, which then has to stay.
    """
    inputs = input_defaults(config.model_name, model_args=config.model_args)
    own_statistics = config.pretrained or data.crop_mode == "border"
    mean, std = (inputs.mean, inputs.std) if own_statistics else (data.channel_mean, data.channel_std)
    preprocessing = data_preprocessing(data, mean, std)
    torch.manual_seed(seed)
    backbone = create_backbone(
        config.model_name,
        pretrained=config.pretrained,
        num_classes=len(data.class_names),
        preprocessing=preprocessing,
        model_args=config.model_args,
    )
    return PixelModel(backbone, preprocessing.mean, preprocessing.std), preprocessing


def load_pixel_model(source: str, *, revision: str | None = None, pretrained: bool = True) -> LoadedModel:
    """Load a model for evaluation, in the form in which it was published, and in the pixel space of its training.

    Nothing is ever unpickled.

    Args:
        source: ``OWNER/NAME`` on the Hub, a folder, or a timm name; timm's prefixes are understood.
        revision: branch, tag or commit of a Hub model.
        pretrained: False: random weights instead of the source's.

    Raises:
        ValueError: if there is no such model, or no safetensors weights for it.
    """
    resolved = resolve_source(complete_name(source, revision))
    weights = resolved.read_weights() if pretrained else None
    try:
        backbone = _build(resolved, resolved.model_args, weights)
    except _BUILD_ERRORS as error:
        raise ValueError(
            f"{source}: {resolved.architecture} cannot be built from its configuration: {error}"
        ) from error
    trained_as = resolved.as_trained()
    preprocessing = preprocessing_of(trained_as.name, trained_as.pretrained_cfg)
    form = resolved.trained_form()
    notes = _other_test_input(resolved.pretrained_cfg, preprocessing)
    for sentence in notes:
        logger.warning("%s", sentence)
    return LoadedModel(
        model=PixelModel(backbone, preprocessing.mean, preprocessing.std, form.upsample if form else 1).eval(),
        preprocessing=preprocessing,
        class_names=_class_names(resolved),
        metadata={key: value for key, value in resolved.extra.items() if key != TRAINED_FORM_KEY},
        notes=notes,
    )


def imagenet_synsets(num_classes: int) -> tuple[str, ...] | None:
    """WordNet names of ImageNet's classes in the order of timm's logits; None for a number no ImageNet has."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    info: Any = ImageNetInfo(subset)
    return tuple(info.label_names())


def _check_arguments(model_args: Mapping[str, object], preprocessing: Preprocessing) -> None:
    for argument, advice in _RESERVED_ARGUMENTS.items():
        if argument in model_args:
            raise ValueError(f"--model_args {argument}={model_args[argument]} cannot be given: {advice}")
    check_model_args(model_args, "--model_args")
    in_chans = model_args.get("in_chans", preprocessing.in_chans)
    if in_chans != preprocessing.in_chans:
        raise ValueError(f"--model_args in_chans={in_chans}, but the images have {preprocessing.in_chans} channels")


def _build(source: ModelSource, arguments: Mapping[str, Any], weights: dict[str, Tensor] | None) -> nn.Module:
    # Inside the configuration, timm adapts weights to the arguments and looks for no file of its own.
    cfg = source.pretrained_cfg if weights is None else {**source.pretrained_cfg, "state_dict": weights}
    with nullcontext() if source.trusted else BuildLimit(weights):
        model: Any = timm.create_model(
            source.architecture, pretrained=weights is not None, pretrained_cfg=cfg, **dict(arguments)
        )
    model.pretrained_cfg.pop("state_dict", None)
    if not hasattr(model, "_model_args"):
        # timm 1.0.31 began to remember the arguments, which an export needs.
        model._model_args = dict(arguments)
    backbone: nn.Module = model
    return backbone


def preprocessing_of(name: str, cfg: Mapping[str, Any], in_chans: object = None) -> Preprocessing:
    """What timm's ``pretrained_cfg`` says, for a network of so many channels; ValueError where it does not fit."""
    channels, height, width = cfg["input_size"]
    if height != width:
        raise ValueError(f"{name}: only square inputs are supported, this model takes {height}x{width}")
    channels = channels if in_chans is None else in_chans
    if not isinstance(channels, int) or isinstance(channels, bool):
        raise ValueError(f"--model_args in_chans={channels!r}: expected the number of channels, 1 or 3")
    return Preprocessing(
        image_size=height,
        in_chans=channels,
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
        mean=_per_channel(name, "mean", cfg, channels),
        std=_per_channel(name, "std", cfg, channels),
    )


def _other_test_input(cfg: Mapping[str, Any], used: Preprocessing) -> tuple[str, ...]:
    """A note where timm measures its own results on larger images than those of training, or crops them less."""
    size = (cfg.get("test_input_size") or (used.image_size,))[-1]
    crop = cfg.get("test_crop_pct") or used.crop_pct
    if (size, crop) == (used.image_size, used.crop_pct):
        return ()
    return (
        f"Images are those of the model's training, {used.image_size} px with crop_pct {used.crop_pct:g}; timm's own "
        f"results are for {size} px with crop_pct {crop:g} (test_input_size, test_crop_pct), so its clean accuracy "
        "differs.",
    )


def _per_channel(name: str, key: str, cfg: Mapping[str, Any], channels: int) -> tuple[float, ...]:
    """One value per channel; their average for every channel if the network's channels are not those of the values."""
    values, own_channels = cfg[key], cfg["input_size"][0]
    if len(values) == channels:
        return tuple(values)
    # timm leaves three values beside one channel when it adapts a network to gray images.
    if len(values) not in (1, own_channels) and own_channels != 1:
        raise ValueError(
            f"{name}: {key} has {len(values)} values for {own_channels} channels, expected one per channel"
        )
    return (sum(values) / len(values),) * channels


def _class_names(source: ModelSource) -> tuple[str, ...] | None:
    names = source.pretrained_cfg.get("label_names")
    num_classes = source.pretrained_cfg["num_classes"]
    if isinstance(names, Mapping):
        names = [names.get(str(index), str(index)) for index in range(num_classes)]
    if not names:
        return None
    if len(names) != num_classes:
        logger.warning("%s: %d label names for %d classes are ignored", source.name, len(names), num_classes)
        return None
    return tuple(str(name) for name in names)
