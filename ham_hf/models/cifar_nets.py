"""The CIFAR networks of the robustness literature, registered with timm, and one of them in exact plain-timm form.

``import ham_hf`` imports this module, so that ``timm.create_model("preactresnet18_cifar")`` works. All networks are
timm's residual ones with a different stem: one 3x3 convolution of stride 1 and no pooling, so a 32x32 image keeps
its resolution until the first stage that strides.

``resnet18_cifar`` need not be published under a name that only this package knows: on the image enlarged four times
by nearest neighbor, timm's own ``resnet18`` with ``replace_stem_pool=True`` computes the same function, with the
weights of :func:`embed_in_resnet18`. The pre-activation networks have no such form, because their max-pooling acts
on raw convolution outputs and always sees more than one of them.
"""

# ruff: noqa: ANN401 - the keyword arguments are whatever timm's classes and factories take

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.create_conv2d import create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

__all__ = ["CifarResNet", "CifarResNetV2"]

EMBEDDING_UPSAMPLE = 4
"""Enlargement of the image, per side, at which plain ``resnet18`` equals ``resnet18_cifar``."""

EMBEDDABLE_ARGUMENTS = frozenset(
    {
        *("num_classes", "in_chans", "global_pool", "layers", "channels", "avg_down", "down_kernel_size"),
        *("drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last"),
    }
)
"""Arguments of ``resnet18_cifar`` that leave the embedding exact: they do not touch activation, norm or strides."""

# A stem without its two strides of 2 divides every stride counted by timm's classes by this.
_STRIDE_RATIO = 4
_STEM_ARGUMENTS = ("stem_type", "stem_width", "replace_stem_pool")
# Where the 3x3 kernel lies in the 7x7 one. At output position 2j + 1 of the stride-2 convolution these taps read rows
# 4j - 1, 4j + 1 and 4j + 4 of the enlarged image: rows j - 1, j and j + 1 of the image, zero padding included.
_TAPS = torch.tensor([0, 2, 5])
_NORM_EPS = 1e-5


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 stride-1 stem and no max-pooling; parameter names are those of timm's ResNet.

    Args:
        block: residual block class.
        layers: number of blocks in each of the four stages.
        output_stride: stride of the last feature map, 2, 4 or 8; below 8, stages dilate instead of striding.
        kwargs: as for ``timm.models.resnet.ResNet``; TypeError for those that shape its stem.
    """

    def __init__(self, block: Any, layers: Sequence[int], output_stride: int = 8, **kwargs: Any) -> None:
        _refuse_stem_arguments(type(self).__name__, kwargs)
        super().__init__(block, tuple(layers), output_stride=_STRIDE_RATIO * output_stride, **kwargs)
        self.add_module("conv1", _stem_convolution(self.conv1))
        self.add_module("maxpool", nn.Identity())
        _divide_reductions(self.feature_info)


class CifarResNetV2(ResNetV2):
    """timm's pre-activation ResNet with a 3x3 stride-1 stem and no max-pooling.

    Args:
        layers: number of blocks in each stage.
        output_stride: stride of the last feature map; a stage that would exceed it dilates instead of striding.
        kwargs: as for ``timm.models.resnetv2.ResNetV2``; TypeError for those that shape its stem (``stem_chs``, the
            number of channels, excepted).
    """

    def __init__(self, layers: Sequence[int], output_stride: int = 8, **kwargs: Any) -> None:
        _refuse_stem_arguments(type(self).__name__, kwargs)
        super().__init__(list(layers), output_stride=_STRIDE_RATIO * output_stride, **kwargs)
        # The name of the pooling stays: timm takes the stem's feature map from in front of it.
        stem: OrderedDict[str, nn.Module] = OrderedDict(conv=_stem_convolution(self.stem.conv), pool=nn.Identity())
        self.stem = nn.Sequential(stem)
        _divide_reductions(self.feature_info)


def embed_in_resnet18(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with which ``resnet18(replace_stem_pool=True)`` on 4x enlarged images equals ``resnet18_cifar``.

    The 3x3 stem lies inside the 7x7 one, and the convolution in place of the pooling is the identity on every second
    position (its norm and ReLU change nothing, since its input is the output of a ReLU).

    Args:
        state: state dict of a ``resnet18_cifar`` whose arguments are in ``EMBEDDABLE_ARGUMENTS``.

    Returns:
        State dict of the plain network. Only ``conv1`` is changed and ``maxpool`` added; the rest is shared.
    """
    stem = state["conv1.weight"]
    num_channels = stem.shape[0]
    conv1 = stem.new_zeros(*stem.shape[:2], 7, 7)
    conv1[:, :, _TAPS[:, None], _TAPS] = stem
    pool = stem.new_zeros(num_channels, num_channels, 3, 3)
    pool[:, :, 2, 2] = torch.eye(num_channels)
    return {
        **state,
        "conv1.weight": conv1,
        "maxpool.0.weight": pool,
        "maxpool.1.weight": stem.new_ones(num_channels),
        "maxpool.1.bias": stem.new_zeros(num_channels),
        "maxpool.1.running_mean": stem.new_zeros(num_channels),
        # Variance + eps is exactly 1 then, so that the norm does not even round.
        "maxpool.1.running_var": stem.new_full((num_channels,), 1 - _NORM_EPS),
        "maxpool.1.num_batches_tracked": torch.tensor(0),
    }


def extract_from_resnet18(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`embed_in_resnet18`; ValueError if ``state`` is not such an embedding (any more)."""
    cifar = {name: value for name, value in state.items() if not name.startswith("maxpool.")}
    cifar["conv1.weight"] = state["conv1.weight"][:, :, _TAPS[:, None], _TAPS].contiguous()
    embedded = embed_in_resnet18(cifar)
    changed = [name for name in embedded if name not in state or not torch.equal(embedded[name], state[name])]
    if changed:
        raise ValueError(
            f"the weights are no longer those of a resnet18_cifar in plain resnet18: {', '.join(changed)} changed"
        )
    return cifar


def _refuse_stem_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    refused = [argument for argument in _STEM_ARGUMENTS if argument in arguments]
    if refused:
        raise TypeError(f"{name} has a fixed 3x3 stem without pooling and takes no {', '.join(refused)}")


def _stem_convolution(replaced: Any) -> nn.Conv2d:
    """A 3x3 stride-1 convolution of the same kind, channels, device and initialization as the one it replaces."""
    stem: nn.Conv2d = type(replaced)(
        replaced.in_channels,
        replaced.out_channels,
        kernel_size=3,
        stride=1,
        padding=1,
        bias=False,
        device=replaced.weight.device,
        dtype=replaced.weight.dtype,
    )
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def _divide_reductions(feature_info: list[dict[str, Any]]) -> None:
    for info in feature_info:
        info["reduction"] = max(1, info["reduction"] // _STRIDE_RATIO)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        # Of the training pixels of CIFAR-10; a run on other data brings its own.
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar.untrained": _cfg(first_conv="conv1", classifier="fc"),
        "preactresnet18_cifar.untrained": _cfg(first_conv="stem.conv", classifier="head.fc"),
        "wideresnet28_10_cifar.untrained": _cfg(first_conv="stem.conv", classifier="head.fc", pool_size=(8, 8)),
        "wideresnet34_10_cifar.untrained": _cfg(first_conv="stem.conv", classifier="head.fc", pool_size=(8, 8)),
    }
)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for 32x32 images, 11.17 M parameters (He et al., 2015, with the stem of the CIFAR literature)."""
    arguments: dict[str, Any] = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **arguments)


@register_model
def preactresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """Pre-activation ResNet-18 for 32x32 images, 11.17 M parameters (He et al., 2016, arXiv:1603.05027).

    The network of robust training since Rice et al. (2020): 64-128-256-512 channels, two blocks each, projection
    shortcuts that start behind the first norm and ReLU of their block, and a norm and ReLU in front of the pooling.
    Some repositories leave the latter out, which makes 1,024 parameters fewer.
    """
    arguments = {"layers": (2, 2, 2, 2), "channels": (64, 128, 256, 512), **kwargs}
    return _create_cifar_resnetv2("preactresnet18_cifar", pretrained, arguments)


@register_model
def wideresnet28_10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """WideResNet-28-10, 36.48 M parameters (Zagoruyko and Komodakis, 2016, arXiv:1605.07146)."""
    arguments = {"layers": (4, 4, 4), "channels": (160, 320, 640), "stem_chs": 16, **kwargs}
    return _create_cifar_resnetv2("wideresnet28_10_cifar", pretrained, arguments)


@register_model
def wideresnet34_10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """WideResNet-34-10, 46.16 M parameters (the large network of TRADES and its successors)."""
    arguments = {"layers": (5, 5, 5), "channels": (160, 320, 640), "stem_chs": 16, **kwargs}
    return _create_cifar_resnetv2("wideresnet34_10_cifar", pretrained, arguments)


def _create_cifar_resnetv2(variant: str, pretrained: bool, arguments: Mapping[str, Any]) -> ResNetV2:
    blocks = {"basic": True, "bottle_ratio": 1.0, "conv_layer": create_conv2d, "norm_layer": "batchnorm2d"}
    feature_cfg = {"flatten_sequential": True, "out_indices": tuple(range(len(arguments["layers"]) + 1))}
    return build_model_with_cfg(CifarResNetV2, variant, pretrained, feature_cfg=feature_cfg, **{**blocks, **arguments})
