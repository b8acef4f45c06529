"""Bring the folder of an older export into the form of today's, where that form serves more readers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch

from ham_hf.models.pixel_model import load_pixel_model
from ham_hf.models.rgb_form import RGB_FOLDER, write_rgb_form
from ham_hf.models.source import CONFIG_KEY, CONFIG_NAME, TRAINED_FORM_KEY, WEIGHTS_NAME

REPAIR_READS = (CONFIG_NAME, WEIGHTS_NAME, f"{RGB_FOLDER}/{CONFIG_NAME}")
"""What a repair looks at, by path inside of the folder."""
REPAIR_WRITES = (CONFIG_NAME, f"{RGB_FOLDER}/{CONFIG_NAME}", f"{RGB_FOLDER}/{WEIGHTS_NAME}")
"""What a repair may write."""


def repair_folder(folder: Path) -> tuple[str, ...]:
    """Repair ``config.json`` of an exported model, and add ``rgb/`` where a network for gray images lacks it.

    Earlier versions recorded the number of classes a second time, in ``model_args``, which transformers refuses. The
    weights stay as they are, and the file is replaced only after timm has loaded the same network from the new one.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.

    Returns:
        What was changed, in words; empty if the folder was in order.

    Raises:
        ValueError: if the folder was not exported by this package, contradicts itself, or is damaged.
        RuntimeError: if timm loads another network from the repaired file; nothing is changed then.
    """
    load_pixel_model(f"local-dir:{folder}")  # refuses what is damaged or dangerous, by name
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if CONFIG_KEY not in config:
        raise ValueError(f"{folder / CONFIG_NAME} was not written by ham_hf: there is no {CONFIG_KEY!r} in it")
    changes = []
    if _name_classes_once(config, folder / CONFIG_NAME):
        _replace(folder, config)
        changes.append(f"{CONFIG_NAME}: num_classes taken out of model_args")
    one_channel = config["pretrained_cfg"]["input_size"][0] == 1
    if one_channel and not (folder / RGB_FOLDER / CONFIG_NAME).is_file() and write_rgb_form(folder):
        changes.append(f"{RGB_FOLDER}/: the same network for RGB images was added")
    return tuple(changes)


def _name_classes_once(config: dict[str, Any], file: Path) -> bool:
    """Take the number of classes out of both records of arguments; True if it was there."""
    found = False
    trained_form = config[CONFIG_KEY].get(TRAINED_FORM_KEY, {})
    for arguments in (config.get("model_args", {}), trained_form.get("model_args", {})):
        if "num_classes" not in arguments:
            continue
        if arguments["num_classes"] != config.get("num_classes"):
            raise ValueError(
                f"{file}: num_classes is {config.get('num_classes')!r}, and {arguments['num_classes']!r} inside of "
                "model_args; only one can be right, so nothing was changed"
            )
        del arguments["num_classes"]
        found = True
    return found


def _replace(folder: Path, config: dict[str, Any]) -> None:
    with TemporaryDirectory(dir=folder, prefix=".repair-") as temporary:
        staging = Path(temporary)
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        (staging / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        shutil.copyfile(folder / WEIGHTS_NAME, staging / WEIGHTS_NAME)
        _check_same_network(folder, staging)
        shutil.copymode(folder / CONFIG_NAME, staging / CONFIG_NAME)
        os.replace(staging / CONFIG_NAME, folder / CONFIG_NAME)


def _check_same_network(before: Path, after: Path) -> None:
    old: Any
    new: Any
    with torch.random.fork_rng(devices=[]):
        old, new = (timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in (before, after))
    states = old.state_dict(), new.state_dict()
    x = torch.rand((1, *old.pretrained_cfg["input_size"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same_logits = torch.allclose(old(x), new(x), rtol=1e-5, atol=1e-5, equal_nan=True)
    same_weights = states[0].keys() == states[1].keys() and all(
        torch.equal(value.nan_to_num(), states[1][key].nan_to_num()) for key, value in states[0].items()
    )
    if type(old) is not type(new) or not same_weights or not same_logits:
        raise RuntimeError(f"timm loads another network from the repaired {CONFIG_NAME} of {before}: left as it was")
