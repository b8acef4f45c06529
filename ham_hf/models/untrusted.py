"""Validation of a model's ``config.json`` before timm sees it.

The file is untrusted: reject anything that is not an image classifier, that would make timm download or unpickle
files, or that would not fit in memory. A ValueError names the entry and what was expected. The limits are our choice,
far above every model of timm. `BuildLimit` also limits the memory for building a network; nothing is built before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ham_hf.files import parse_json

MAX_BYTES = 64 * 2**20
"""Size of the file; a thousand names of classes take 20 KB."""
MAX_NUMBER = 1_000_000
"""Largest whole number: classes, channels, layers."""
MAX_SIDE = 4096
"""Longest side of an input in pixels."""
MAX_UPSAMPLE = 64
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""What timm can evaluate with; its "random" draws one of two per image of training, and fails in its evaluation."""
_INTERPOLATION = f"one of {', '.join(INTERPOLATIONS)} (timm's random is for training alone)"
CROP_MODES = ("center", "squash", "border")
MIN_CROP_PCT, MAX_CROP_PCT = 0.01, 2
"""Side of the input by the side that images are resized to; timm's own are from 0.8 to 1.15."""
_CROP_RANGE = f"a share in [{MIN_CROP_PCT}, {MAX_CROP_PCT}]"

FORBIDDEN_ARGUMENTS = ("checkpoint_path", "cache_dir", "device", "dtype", "kwargs_filter", "model_cfg", "model_cls")
"""Arguments of ``timm.create_model`` that read files, or replace what is built."""
FORBIDDEN_PREFIXES = ("pretrained", "feature", "out_indices")


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` and check sizes, numbers, nesting and arguments; ValueError says what is wrong."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, expected at most {MAX_BYTES}")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(config, dict):
        raise ValueError(f"expected an object with an architecture, got {_shown(config)}")
    _expect(config, "architecture", "the name of an architecture", lambda value: isinstance(value, str))
    # timm reads a file without "pretrained_cfg" as one that is its own.
    for key in ("pretrained_cfg", "model_args"):
        _expect(config, key, "an object", lambda value: isinstance(value, dict), optional=True)
    check_model_args(config.get("model_args", {}), "model_args")
    return config


def check_model_args(arguments: Mapping[str, object], where: str) -> None:
    """Reject arguments that make timm read a file, or do not fit in memory; ValueError names the argument."""
    for name, value in arguments.items():
        if name in FORBIDDEN_ARGUMENTS or name.startswith(FORBIDDEN_PREFIXES):
            raise ValueError(f"{where} {_word(name)} cannot be set: it is no argument of a network")
        _check_numbers(value, f"{where} {_word(name)}")


def check_pretrained_cfg(cfg: Mapping[str, Any]) -> None:
    """Check the entries used of timm's description of the weights: input, preprocessing, classes."""
    size = f"channels, height and width of at most {MAX_SIDE} pixels"
    for prefix in ("", "test_"):
        _expect(cfg, f"{prefix}input_size", size, _is_size, optional=bool(prefix))
        _expect(cfg, f"{prefix}crop_pct", _CROP_RANGE, _is_crop, optional=bool(prefix))
    _expect(cfg, "interpolation", _INTERPOLATION, _is_interpolation)
    _expect(cfg, "crop_mode", f"one of {', '.join(CROP_MODES)}", lambda value: value in CROP_MODES)
    _expect(cfg, "mean", "one number per channel", lambda value: _is_list(value, _is_number))
    positive = "one number > 0 per channel"
    _expect(cfg, "std", positive, lambda value: _is_list(value, lambda item: _is_number(item) and item > 0))
    _expect(cfg, "num_classes", f"a whole number from 0 to {MAX_NUMBER}", _is_whole)
    _expect(cfg, "label_names", "a list of names, or an object that names numbers", _is_names, optional=True)
    _expect(cfg, "fixed_input_size", "true or false", lambda value: isinstance(value, bool), optional=True)
    for key in ("first_conv", "classifier"):
        _expect(cfg, key, "the name of a layer, or several", _is_layers, optional=True)
    for key in sorted(cfg.keys() - {"label_names", "label_descriptions"}):
        _check_numbers(cfg[key], key)


def check_trained_form(form: Mapping[str, object]) -> None:
    """Check this package's record of the network and the pixel space of training."""
    _expect(form, "architecture", "the name of an architecture", lambda value: isinstance(value, str))
    _expect(form, "model_args", "an object", lambda value: isinstance(value, dict))
    check_model_args(form["model_args"], "model_args")  # type: ignore[arg-type]  # as just checked
    side = f"a whole number from 1 to {MAX_SIDE}"
    _expect(form, "image_size", side, lambda value: _is_whole(value) and 1 <= value <= MAX_SIDE)
    _expect(form, "interpolation", _INTERPOLATION, _is_interpolation)
    _expect(form, "crop_pct", _CROP_RANGE, _is_crop)
    _expect(form, "crop_mode", f"one of {', '.join(CROP_MODES)}", lambda value: value in CROP_MODES, optional=True)
    factor = f"a whole number from 1 to {MAX_UPSAMPLE}"
    _expect(form, "upsample", factor, lambda value: _is_whole(value) and 1 <= value <= MAX_UPSAMPLE)


def check_metadata(metadata: Mapping[str, object]) -> None:
    """Check what this package reads of the metadata that came with a model; the rest may be anything."""
    _expect(metadata, "norm", "linf or l2", lambda value: value in ("linf", "l2"), optional=True)
    _expect(metadata, "epsilon", "a number > 0", lambda value: _is_number(value) and value > 0, optional=True)
    fraction = "a number in (0, 1)"
    _expect(metadata, "test_fraction", fraction, lambda value: _is_number(value) and 0 < value < 1, optional=True)
    calibration = "an object with the original bias of each head and a shift per class"
    _expect(metadata, "calibration", calibration, _is_calibration, optional=True)
    _expect(metadata, "trained_on", "an object", lambda value: isinstance(value, dict), optional=True)
    for key in ("dataset", "method"):
        _expect(metadata, key, "a name", lambda value: isinstance(value, str), optional=True)


def _expect(
    values: Mapping[str, object], key: str, what: str, holds: Callable[[Any], bool], *, optional: bool = False
) -> None:
    value = values.get(key)
    if not (optional if value is None else holds(value)):
        raise ValueError(f"{key} should be {what}, got {_shown(value)}")


def _check_numbers(value: object, where: str, depth: int = 0) -> None:
    if depth > 8:
        raise ValueError(f"{where} is nested too deeply")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item, where, depth + 1)
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
        raise ValueError(f"{where} should hold numbers up to {MAX_NUMBER}, got {_shown(value)}")


def _is_int(value: Any) -> bool:  # noqa: ANN401 (that is the question)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:  # noqa: ANN401
    return _is_int(value) and 0 <= value <= MAX_NUMBER


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= MAX_NUMBER


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:  # noqa: ANN401
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(is_item, value))


def _is_calibration(value: Any) -> bool:  # noqa: ANN401
    biases, shifts = (value.get("original_bias"), value.get("shifts")) if isinstance(value, dict) else (None, None)
    return (
        _is_list(shifts, _is_number)
        and _is_list(biases, lambda bias: _is_list(bias, _is_number) and len(bias) == len(shifts))  # type: ignore[arg-type]
    )


def _is_size(value: Any) -> bool:  # noqa: ANN401
    return _is_list(value, _is_whole) and len(value) == 3 and min(value) >= 1 and max(value) <= MAX_SIDE


def _is_interpolation(value: object) -> bool:
    return value in INTERPOLATIONS


def _is_crop(value: object) -> bool:
    return _is_number(value) and MIN_CROP_PCT <= value <= MAX_CROP_PCT  # type: ignore[operator]


def _is_names(value: Any) -> bool:  # noqa: ANN401
    names = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list | tuple) and all(isinstance(name, str) for name in names)


def _is_layers(value: object) -> bool:
    return isinstance(value, str) or _is_list(value, lambda item: isinstance(item, str))


def _word(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 60 else _shown(name)


def _shown(value: object) -> str:
    """A value for a message: as Python writes it, without characters that move or color text, and short."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nesting; integers of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


MARGIN_BYTES = 256 * 2**20
MARGIN_TENSORS = 20_000
FACTOR = 8
"""How much more than its weights a network may take while it is built: half-precision files, buffers, drafts."""
UNKNOWN_BYTES = 24 * 2**30
UNKNOWN_TENSORS = 200_000


class TooLargeError(ValueError):
    """A network that its weights cannot belong to."""


class BuildLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count new tensors inside, and raise before taking the memory of one too many.

    A configuration can ask for any number of layers, channels and classes, but its weights have to be that size too:
    the network may be ``FACTOR`` times as large as ``weights``, its state dict, plus a margin; without weights, limits
    are fixed. TooLargeError is raised from inside.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.tensors = 0, 0
        if weights is None:
            self.max_bytes, self.max_tensors = UNKNOWN_BYTES, UNKNOWN_TENSORS
        else:
            size = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in weights.values())
            self.max_bytes = FACTOR * size + MARGIN_BYTES
            self.max_tensors = FACTOR * len(weights) + MARGIN_TENSORS

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Count the tensors that ``func`` makes of sizes alone; what is made of tensors is no larger than they are."""
        options = dict(kwargs or {})
        made_of_tensors = any(isinstance(value, Tensor) for value in (*args, *options.values()))
        if not made_of_tensors:
            self._count(func, args, options)
        return func(*args, **options)

    def _count(self, func: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> None:
        sizes = [value for value in args if isinstance(value, list | tuple) and all(map(_is_int, value))]
        numbers = [abs(v) for v in args if _is_int(v) or (isinstance(v, float) and math.isfinite(v))]
        # A shape is a list; without one, linspace, arange and eye make as many as one of their numbers says.
        items = math.prod(sizes[0]) if sizes else max([1, *numbers])
        dtype = options.get("dtype") or torch.get_default_dtype()
        self.bytes += int(items) * dtype.itemsize
        self.tensors += 1
        if self.bytes > self.max_bytes or self.tensors > self.max_tensors:
            raise TooLargeError(
                f"the network it describes takes more than {self.max_bytes / 2**30:.3g} GiB or {self.max_tensors} "
                "tensors, which its weights do not fill"
            )
