"""Write a trained backbone so that ``timm.create_model`` loads it, and check that it does.

A network for gray images is written a second time in a form that takes RGB, for clients that give RGB to every
network. Pillow's gray is a weighted sum of red, green and blue with weights that add up to 1. So a first layer that is
linear takes RGB itself when its weights are multiplied with those: the same function of a gray image, and that of its
gray version, but for the rounding to whole gray levels, of a color image. Our choice.

`repair_folder` brings the folder of an older export into this form.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ham_hf.artifacts import CONFIG_NAME, WEIGHTS_NAME
from ham_hf.files import replace
from ham_hf.models.cifar_nets import (
    EMBEDDABLE_ARGUMENTS,
    EMBEDDING_UPSAMPLE,
    CifarResNet,
    default_cfgs,
    embed_in_resnet18,
)
from ham_hf.models.pixel_model import PixelModel, Preprocessing, compare_logits, load_pixel_model
from ham_hf.models.source import CONFIG_KEY, TRAINED_FORM_KEY, TrainedForm

# Modules that hold the backbone: torch.compile, DistributedDataParallel and timm's EMA, PixelModel.
_WRAPPER_ATTRIBUTES = ("_orig_mod", "module", "backbone")
# Entries kept where pretrained_cfg is written anew: timm needs them to adapt weights to other arguments.
_ARCHITECTURE_KEYS = ("first_conv", "classifier")
_REGULARIZATION = ("drop_rate", "drop_path_rate", "drop_block_rate")
_LOGIT_TOLERANCE = 1e-4

RGB_FOLDER = "rgb"
"""Subfolder of the second form, in the folder of the first."""
GRAY_OF_RGB = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""Weights of ``Image.convert("L")`` (Pillow's documentation: ITU-R 601-2)."""


@dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """The exported network.

    Attributes:
        architecture: timm name in ``config.json``.
        needs_ham_hf: True if ``import ham_hf`` has to come before ``timm.create_model``.
        input_size: (C, H, W) that the exported network takes.
        interpolation: resampling to that size, by timm's names. For ``upsample > 1`` it is "nearest", and timm's
            transform is exact on images that already have the side of training, ``H / upsample``; others have to be
            brought to that side first, as they were for training.
        upsample: enlargement per side between the pixels of training and the exported network's input.
        num_parameters: parameters of the exported network.
        has_rgb_form: True if ``rgb/`` holds the same network for clients that give RGB to every network.
    """

    architecture: str
    needs_ham_hf: bool
    input_size: tuple[int, int, int]
    interpolation: str
    upsample: int
    num_parameters: int
    has_rgb_form: bool


@dataclass(frozen=True, kw_only=True)
class _Published:
    """Architecture, arguments and weights that go into the files."""

    architecture: str
    model_args: dict[str, Any]
    state: dict[str, Tensor]
    upsample: int


def export_for_timm(
    backbone: nn.Module,
    folder: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    metadata: Mapping[str, object],
    model_license: str,
    tag: str,
) -> ExportInfo:
    """Write ``model.safetensors`` and ``config.json`` and compare what timm loads from them with the backbone.

    ``resnet18_cifar`` is written as plain ``resnet18`` behind a 4x nearest-neighbor enlargement, which is the same
    function; an argument that would break the equality (another activation, say) keeps it under its own name. The
    files appear in ``folder`` only after the comparison has passed, each of them at once. A network for gray images
    is written a second time, into ``rgb/``, where it has that form.

    Args:
        backbone: a timm module made by ``create_backbone`` (or ``timm.create_model`` of timm 1.0.31 and later, which
            remembers its arguments); also inside torch.compile, DistributedDataParallel, timm's EMA or
            ``PixelModel``, on any device, in any mode, memory format and floating-point type. It is not changed, and
            neither is the global random state.
        folder: is created if needed; other files in it stay.
        preprocessing: of training.
        class_names: one per logit, in order.
        metadata: JSON values kept in ``config.json`` under ``ham_hf``: threat model, numbers, origin.
        model_license: identifier, as in the Hub's model cards ("apache-2.0").
        tag: names the weights, as timm does ("ham_cifar10"); takes the place of the tag of the starting weights.

    Raises:
        ValueError: if classes or channels do not match the backbone, or something cannot be written as JSON.
        RuntimeError: if the backbone's logits are not finite, or the network that timm builds from the files disagrees
            with it.
    """
    trained, arguments = _copy_of_trained(backbone)
    if len(class_names) != trained.num_classes:
        raise ValueError(f"{len(class_names)} class names for a model with {trained.num_classes} classes")
    if (in_chans := arguments["in_chans"]) != preprocessing.in_chans:
        raise ValueError(f"the model takes {in_chans} channels, its preprocessing says {preprocessing.in_chans}")
    if TRAINED_FORM_KEY in metadata:
        raise ValueError(f"the metadata key {TRAINED_FORM_KEY!r} is taken by the export itself")
    published = _published_form(trained, arguments)
    config = _config(trained, arguments, published, preprocessing, class_names)
    config[CONFIG_KEY] |= metadata
    config["pretrained_cfg"] |= {"tag": tag, "license": model_license}
    try:
        text = _as_text(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG_NAME} cannot hold a value of --model_args or of the metadata: {error}") from error

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as staging:
        _write_files(staging, published.state, text)
        num_parameters = _verify(staging, trained, preprocessing, published.upsample)
        # Left by an earlier export: removed before the network that it belonged to is replaced.
        _remove_rgb_form(folder)
        _move_files(staging, folder)
    has_rgb_form = preprocessing.in_chans == 1 and _write_rgb_form(folder)
    return ExportInfo(
        architecture=published.architecture,
        needs_ham_hf=published.architecture in default_cfgs,
        input_size=config["pretrained_cfg"]["input_size"],
        interpolation=config["pretrained_cfg"]["interpolation"],
        upsample=published.upsample,
        num_parameters=num_parameters,
        has_rgb_form=has_rgb_form,
    )


def _as_text(config: Mapping[str, object]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    with TemporaryDirectory(dir=folder, prefix=".export-") as staging:
        yield Path(staging)


def _write_files(folder: Path, state: Mapping[str, Tensor], config: str) -> None:
    save_file(dict(state), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
    # safetensors leaves a file that only its owner may read.
    shutil.copymode(folder / CONFIG_NAME, folder / WEIGHTS_NAME)


def _move_files(staging: Path, folder: Path) -> None:
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        replace(staging / name, folder / name)


def _as_timm_loads(folder: Path) -> Any:  # noqa: ANN401 (with timm's attributes)
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _copy_of_trained(model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """A float32 copy on the CPU, in eval mode, of the backbone that was trained, and its arguments."""
    # A compiled module forwards the attributes of the one inside, so look for it first.
    while "_orig_mod" in model._modules or not hasattr(model, "pretrained_cfg"):
        inner = [model._modules[name] for name in _WRAPPER_ATTRIBUTES if name in model._modules]
        if not inner or inner[0] is None:
            raise ValueError(f"expected a timm model, got a {type(model).__name__} without pretrained_cfg")
        model = inner[0]
    module: Any = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    if not hasattr(module, "_model_args"):
        raise ValueError("the model does not know the arguments it was built with; make it with create_backbone")
    arguments = {
        name: value
        for name, value in module._model_args.items()
        # The number of classes stands beside model_args; transformers refuses a second one.
        if name != "num_classes" and name not in _REGULARIZATION and not name.endswith("_drop_rate")
    }
    arguments.setdefault("in_chans", module.pretrained_cfg["input_size"][0])
    return module, arguments


def _published_form(trained: Any, arguments: dict[str, Any]) -> _Published:  # noqa: ANN401
    """The network as it is, or the plain one that computes the same."""
    # Contiguous tensors that share no memory: the file format takes no others.
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in trained.state_dict().items()}
    if isinstance(trained, CifarResNet) and arguments.keys() <= EMBEDDABLE_ARGUMENTS:
        return _Published(
            architecture="resnet18",
            model_args={**arguments, "replace_stem_pool": True},
            state=embed_in_resnet18(state),
            upsample=EMBEDDING_UPSAMPLE,
        )
    architecture = trained.pretrained_cfg["architecture"]
    return _Published(architecture=architecture, model_args=arguments, state=state, upsample=1)


def _config(
    trained: Any,  # noqa: ANN401 (with timm's attributes)
    arguments: dict[str, Any],
    published: _Published,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Describe the network, its input and its weights to timm.

    Nothing that timm says of the starting weights is copied: tag, license, paper, origin.
    """
    trained_form = TrainedForm(
        architecture=trained.pretrained_cfg["architecture"],
        model_args=arguments,
        image_size=preprocessing.image_size,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        upsample=published.upsample,
    )
    size = preprocessing.image_size * published.upsample
    # Enlarging the pixels of training is all that may happen in front of an embedded network.
    plain = published.upsample == 1
    return {
        "architecture": published.architecture,
        "num_classes": trained.num_classes,
        "num_features": trained.num_features,
        "model_args": published.model_args,
        CONFIG_KEY: {TRAINED_FORM_KEY: asdict(trained_form)},
        "label_names": list(class_names),
        "pretrained_cfg": {
            **{key: trained.pretrained_cfg.get(key) for key in _ARCHITECTURE_KEYS},
            "input_size": (preprocessing.in_chans, size, size),
            "interpolation": preprocessing.interpolation if plain else "nearest",
            "crop_pct": preprocessing.crop_pct if plain else 1.0,
            "crop_mode": preprocessing.crop_mode,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "fixed_input_size": bool(trained.pretrained_cfg.get("fixed_input_size")),
            "num_classes": trained.num_classes,
            "pool_size": None,
        },
    }


def _verify(folder: Path, trained: nn.Module, preprocessing: Preprocessing, upsample: int) -> int:
    """Compare what plain timm loads with the trained network, on pixels, and return its number of parameters.

    RuntimeError if the logits of the trained network are not finite, or differ.
    """
    published = _pixel_model(_as_timm_loads(folder), upsample)
    original = PixelModel(trained, preprocessing.mean, preprocessing.std)
    difference, largest = compare_logits(original, published, preprocessing.image_size)
    if not math.isfinite(largest):
        spoiled = [name for name, value in trained.state_dict().items() if not value.isfinite().all()]
        weights = f"values in {', '.join(spoiled[:5])} are not finite" if spoiled else "its weights are finite"
        raise RuntimeError(
            f"the logits of the trained network are not finite ({weights}), so nothing was written: train again with "
            "a lower --learning_rate, or take weights of an earlier epoch"
        )
    # Written so that NaN fails.
    if not difference <= _LOGIT_TOLERANCE * max(1.0, largest):
        raise RuntimeError(
            f"the network that timm loads from the export disagrees with the trained one by {difference:.2g} in the "
            f"logits (the largest logit is {largest:.2g}), so nothing was written. Was the model changed after it was "
            f"built?"
        )
    return sum(parameter.numel() for parameter in published.parameters())


def _pixel_model(net: Any, upsample: int = 1) -> PixelModel:  # noqa: ANN401 (with timm's attributes)
    return PixelModel(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"], upsample)


def _write_rgb_form(folder: Path) -> bool:
    """Write ``rgb/`` into the folder of an exported model for gray images and return True, or remove it.

    There is no such form of a network whose first layer is not linear (that of an NFNet standardizes its weights).
    Both forms are compared on gray images before the second one is kept.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    first_layer = f"{config['pretrained_cfg']['first_conv']}.weight"
    state = load_file(folder / WEIGHTS_NAME)
    weight = state.get(first_layer)
    if weight is not None and weight.ndim == 4 and weight.shape[1] == 1:
        state[first_layer] = (weight * torch.tensor(GRAY_OF_RGB).view(1, 3, 1, 1)).contiguous()
        with _staging(folder) as staging:
            _write_files(staging, state, _as_text(_rgb_config(config)))
            if _same_network(folder, staging):
                (folder / RGB_FOLDER).mkdir(exist_ok=True)
                _move_files(staging, folder / RGB_FOLDER)
                return True
    _remove_rgb_form(folder)
    return False


def _remove_rgb_form(folder: Path) -> None:
    if (folder / RGB_FOLDER / CONFIG_NAME).is_file():
        shutil.rmtree(folder / RGB_FOLDER)


def _rgb_config(config: Mapping[str, Any]) -> dict[str, Any]:
    rgb: dict[str, Any] = copy.deepcopy(dict(config))
    cfg = rgb["pretrained_cfg"]
    cfg["input_size"] = [3, *cfg["input_size"][1:]]
    for key in ("mean", "std"):
        cfg[key] = [*cfg[key]] * 3
    rgb["model_args"]["in_chans"] = 3
    rgb[CONFIG_KEY][TRAINED_FORM_KEY]["model_args"]["in_chans"] = 3
    return rgb


REPAIR_READS = (CONFIG_NAME, WEIGHTS_NAME, f"{RGB_FOLDER}/{CONFIG_NAME}")
"""Files that a repair reads, by path inside the folder."""
REPAIR_WRITES = (CONFIG_NAME, f"{RGB_FOLDER}/{CONFIG_NAME}", f"{RGB_FOLDER}/{WEIGHTS_NAME}")
"""Files that a repair may write."""


def repair_folder(folder: Path) -> tuple[str, ...]:
    """Repair ``config.json`` of an exported model, and add ``rgb/`` where a network for gray images lacks it.

    Earlier versions recorded the number of classes a second time, in ``model_args``, which transformers refuses. The
    weights stay as they are, and the file is replaced only after timm has loaded the same network from the new one.

    Returns:
        The changes, in words; empty if the folder was in order.

    Raises:
        ValueError: if the folder was not exported by this package, contradicts itself, or is damaged.
        RuntimeError: if timm loads a different network from the repaired file; nothing is changed then.
    """
    load_pixel_model(f"local-dir:{folder}")  # ValueError if it is damaged or dangerous
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if CONFIG_KEY not in config:
        raise ValueError(f"{folder / CONFIG_NAME} was not written by ham_hf: there is no {CONFIG_KEY!r} in it")
    changes = []
    if _name_classes_once(config, folder / CONFIG_NAME):
        with _staging(folder) as staging:
            (staging / CONFIG_NAME).write_text(_as_text(config), encoding="utf-8")
            shutil.copyfile(folder / WEIGHTS_NAME, staging / WEIGHTS_NAME)
            if not _same_network(folder, staging):
                raise RuntimeError(
                    f"timm loads a different network from the repaired {CONFIG_NAME} of {folder}: nothing was changed"
                )
            shutil.copymode(folder / CONFIG_NAME, staging / CONFIG_NAME)
            replace(staging / CONFIG_NAME, folder / CONFIG_NAME)
        changes.append(f"{CONFIG_NAME}: num_classes taken out of model_args")
    one_channel = config["pretrained_cfg"]["input_size"][0] == 1
    if one_channel and not (folder / RGB_FOLDER / CONFIG_NAME).is_file() and _write_rgb_form(folder):
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


def _same_network(before: Path, after: Path) -> bool:
    """Whether timm loads the same kind of network from both folders, with the same logits of gray or color images."""
    old, new = _as_timm_loads(before), _as_timm_loads(after)
    side = old.pretrained_cfg["input_size"][-1]
    difference, largest = compare_logits(_pixel_model(old), _pixel_model(new), side)
    return type(old) is type(new) and difference <= _LOGIT_TOLERANCE * max(1.0, largest)
