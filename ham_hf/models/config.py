"""The settings of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ham_hf.settings import SettingsGroup, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig(SettingsGroup):
    """Which network."""

    model_name: str = setting("resnet18_cifar", "any timm model name")
    pretrained: bool = setting(False, "start from timm's pretrained weights")
    model_args: Mapping[str, object] = setting(
        {}, "arguments for the timm model, such as drop_path_rate=0.1 or layers=[1,1,1,1]; replaces the recipe's"
    )
    image_size: int | None = setting(
        None,
        "side of the images in pixels; none = the dataset's if all are squares up to 96, else the model's",
        at_least=1,
        at_most=4096,
    )
