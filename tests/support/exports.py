"""Networks of each family of timm that the tests export, trained for one step."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ham_hf.models import PixelModel, Preprocessing, create_backbone
from ham_hf.models.export import ExportInfo, export_for_timm

CLASSES = [f"class {index}" for index in range(10)]
SMALL_RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 24, 24, 32]}
SMALL_PREACT = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}
SMALL_WIDE = {"layers": [1, 1, 1], "channels": [16, 16, 24], "stem_chs": 8}
FAMILIES = {
    "test_resnet": {},
    "test_convnext": {},
    "test_vit": {"patch_size": 8},
    "test_efficientnet": {},
    "test_nfnet": {},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "patch_size": 2,
        "window_size": 4,
    },
    "test_byobnet": {},
    "resnet18_cifar": SMALL_RESNET,
    "preactresnet18_cifar": SMALL_PREACT,
    "wideresnet28_10_cifar": SMALL_WIDE,
}


def preprocessing(size: int = 32, in_chans: int = 3, **changes) -> Preprocessing:
    values = {
        "image_size": size,
        "in_chans": in_chans,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": (0.49, 0.48, 0.45)[:in_chans],
        "std": (0.25, 0.24, 0.26)[:in_chans],
    }
    return Preprocessing(**{**values, **changes})


def trained(name: str, size: int = 32, in_chans: int = 3, **model_args) -> nn.Module:
    """A network after one SGD step on random pixels, with running statistics of its own."""
    torch.manual_seed(0)
    backbone = create_backbone(
        name, pretrained=False, num_classes=10, preprocessing=preprocessing(size, in_chans), model_args=model_args
    )
    settings = preprocessing(size, in_chans)
    model = PixelModel(backbone, settings.mean, settings.std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(backbone.state_dict())
    loss = F.cross_entropy(model(torch.rand(4, in_chans, size, size)), torch.arange(4))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert any(not torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    return backbone


def export(backbone: nn.Module, folder: Path, settings: Preprocessing | None = None, **changes) -> ExportInfo:
    values = {
        "preprocessing": settings or preprocessing(),
        "class_names": CLASSES,
        "metadata": {},
        "model_license": "mit",
        "tag": "ham_test",
    }
    return export_for_timm(backbone, folder, **{**values, **changes})
