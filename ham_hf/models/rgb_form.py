"""A network for gray images in a second form, which takes RGB, for clients that give RGB to every network.

Pillow's gray is a weighted sum of red, green and blue with weights that add up to 1. So a first layer that is linear
takes RGB itself when its weights are multiplied with those: the same function of a gray image, and that of its gray
version, but for the rounding to whole gray levels, of a color image. Our choice.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ham_hf.models.pixel_model import PixelModel
from ham_hf.models.source import CONFIG_KEY, CONFIG_NAME, TRAINED_FORM_KEY, WEIGHTS_NAME

RGB_FOLDER = "rgb"
"""Where the second form lies inside of the folder of the first."""
GRAY_OF_RGB = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""Weights of ``Image.convert("L")`` (Pillow's documentation: ITU-R 601-2)."""
_TOLERANCE = 1e-4


def write_rgb_form(folder: Path) -> bool:
    """Write ``rgb/`` into the folder of an exported model for gray images, or remove it where there is no such form.

    There is none for a network that takes other than one channel, and for one whose first layer is not linear (that of
    an NFNet standardizes its weights). Nothing is taken on trust: both forms are compared on gray images.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` as ``export_for_timm`` writes them.

    Returns:
        True if the second form was written.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    with TemporaryDirectory(dir=folder, prefix=".rgb-") as temporary:
        staging = Path(temporary)
        written = _write_folded(folder, config, staging) and _same_on_gray(folder, staging, config["pretrained_cfg"])
        if written:
            target = folder / RGB_FOLDER
            target.mkdir(exist_ok=True)
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(staging / name, target / name)
    if not written:
        remove_rgb_form(folder)
    return written


def remove_rgb_form(folder: Path) -> None:
    """Remove ``rgb/`` of an earlier export, if there is one."""
    if (folder / RGB_FOLDER / CONFIG_NAME).is_file():
        shutil.rmtree(folder / RGB_FOLDER)


def _write_folded(folder: Path, config: Mapping[str, Any], target: Path) -> bool:
    """Write both files of the second form; False if it is clear already that there is none."""
    cfg = config["pretrained_cfg"]
    if cfg["input_size"][0] != 1 or not isinstance(cfg["first_conv"], str):
        return False
    state = load_file(folder / WEIGHTS_NAME)
    key = f"{cfg['first_conv']}.weight"
    weight = state.get(key)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 1:
        return False
    state[key] = (weight * torch.tensor(GRAY_OF_RGB).view(1, 3, 1, 1)).contiguous()
    save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(_rgb_config(config), indent=2, ensure_ascii=False, allow_nan=False)
    (target / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    shutil.copymode(target / CONFIG_NAME, target / WEIGHTS_NAME)
    return True


def _rgb_config(config: Mapping[str, Any]) -> dict[str, Any]:
    rgb: dict[str, Any] = copy.deepcopy(dict(config))
    cfg = rgb["pretrained_cfg"]
    cfg["input_size"] = [3, *cfg["input_size"][1:]]
    for key in ("mean", "std"):
        cfg[key] = [*cfg[key]] * 3
    rgb["model_args"]["in_chans"] = 3
    rgb[CONFIG_KEY][TRAINED_FORM_KEY]["model_args"]["in_chans"] = 3
    return rgb


def _same_on_gray(folder: Path, rgb: Path, cfg: Mapping[str, Any]) -> bool:
    """Whether both forms give the same logits for gray images (False if any is not finite)."""
    x = torch.rand((2, *cfg["input_size"]), generator=torch.Generator().manual_seed(0))
    gray = _logits(folder, cfg, x)
    difference = (_logits(rgb, cfg, x.repeat(1, 3, 1, 1)) - gray).abs().max().item()
    return bool(difference <= _TOLERANCE * max(1.0, gray.abs().max().item()))


def _logits(folder: Path, cfg: Mapping[str, Any], x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    channels = x.shape[1]
    with torch.no_grad():
        logits: Tensor = PixelModel(network, [*cfg["mean"]] * channels, [*cfg["std"]] * channels)(x)
    return logits
