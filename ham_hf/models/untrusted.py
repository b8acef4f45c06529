"""Validation of a model's ``config.json`` before timm sees it.

The file is untrusted: reject anything that is not an image classifier, that would make timm download or unpickle
files, or that would not fit in memory. ValueError names the entry and the expected values. The limits are our choice,
far above every model of timm. `BuildLimit` also limits the memory for building a network; nothing is built before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ham_hf.files import parse_json
from ham_hf.settings import Bounds, is_kind

MAX_BYTES = 64 * 2**20
"""Size of the file; a thousand names of classes take 20 KB."""
MAX_NUMBER = 1_000_000
"""Largest whole number: classes, channels, layers."""
MAX_SIDE = 4096
"""Longest side of an input in pixels."""
MAX_UPSAMPLE = 64
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Interpolations that timm can evaluate with; its "random" is for training and fails in evaluation."""
CROP_MODES = ("center", "squash", "border")
MIN_CROP_PCT, MAX_CROP_PCT = 0.01, 2
"""Side of the input by the side that images are resized to; timm's own are from 0.8 to 1.15."""

FORBIDDEN_ARGUMENTS = ("checkpoint_path", "cache_dir", "device", "dtype", "kwargs_filter", "model_cfg", "model_cls")
"""Arguments of ``timm.create_model`` that read files, or replace what is built."""
FORBIDDEN_PREFIXES = ("pretrained", "feature", "out_indices")


class _Rule(NamedTuple):
    what: str
    holds: Callable[[Any], bool]


def _number(what: str, kind: type = float, **ends: float) -> _Rule:
    bounds = Bounds(**{"at_least": -MAX_NUMBER, "at_most": MAX_NUMBER} | ends)
    return _Rule(what, lambda value: is_kind(value, kind) and value in bounds)


def _whole(first: int, last: int) -> _Rule:
    return _number(f"a whole number from {first} to {last}", int, at_least=first, at_most=last)


def _one_of(names: Sequence[str], note: str = "") -> _Rule:
    return _Rule(f"one of {', '.join(names)}{note}", lambda value: value in names)


def _list(what: str, is_item: Callable[[Any], bool]) -> _Rule:
    return _Rule(what, lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(is_item, value)))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    names = list(value.values()) if isinstance(value, dict) else value
    return isinstance(names, list | tuple) and all(map(_is_text, names))


_NUMBERS = _list("one number per channel", _number("a number").holds)


def _is_calibration(value: Any) -> bool:  # noqa: ANN401 (that is the question)
    shifts: Any = value.get("shifts") if isinstance(value, dict) else None
    if not _NUMBERS.holds(shifts):
        return False
    fits = _list("numbers per head", lambda bias: _NUMBERS.holds(bias) and len(bias) == len(shifts))
    return fits.holds(value.get("original_bias"))


_OBJECT = _Rule("an object", lambda value: isinstance(value, dict))
_SIDES = _list(f"channels, height and width of at most {MAX_SIDE} pixels", _whole(1, MAX_SIDE).holds)
_SIZE = _Rule(_SIDES.what, lambda value: _SIDES.holds(value) and len(value) == 3)
_CROP_PCT = _number(f"a share in [{MIN_CROP_PCT}, {MAX_CROP_PCT}]", at_least=MIN_CROP_PCT, at_most=MAX_CROP_PCT)
_LAYERS = _Rule(
    "the name of a layer, or several", lambda value: _is_text(value) or _list("names", _is_text).holds(value)
)
_RULES = {
    "architecture": _Rule("the name of an architecture", _is_text),
    "model_args": _OBJECT,
    "pretrained_cfg": _OBJECT,
    "num_classes": _whole(0, MAX_NUMBER),
    "label_names": _Rule("a list of names, or an object that names numbers", _is_names),
    "first_conv": _LAYERS,
    "classifier": _LAYERS,
    "fixed_input_size": _Rule("true or false", lambda value: isinstance(value, bool)),
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "crop_pct": _CROP_PCT,
    "test_crop_pct": _CROP_PCT,
    "crop_mode": _one_of(CROP_MODES),
    "interpolation": _one_of(INTERPOLATIONS, " (timm's random is for training alone)"),
    "mean": _NUMBERS,
    "std": _list("one number > 0 per channel", _number("a number > 0", above=0).holds),
    "image_size": _whole(1, MAX_SIDE),
    "upsample": _whole(1, MAX_UPSAMPLE),
    "norm": _Rule("linf or l2", lambda value: value in ("linf", "l2")),
    "epsilon": _number("a number > 0", above=0),
    "test_fraction": _number("a number in (0, 1)", above=0, below=1),
    "calibration": _Rule("an object with the original bias of each head and a shift per class", _is_calibration),
    "trained_on": _OBJECT,
    "dataset": _Rule("a name", _is_text),
    "method": _Rule("a name", _is_text),
}
"""The rule of each entry that is used, wherever in the file it stands."""


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` and check sizes, numbers, nesting and arguments; ValueError names the problem."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, expected at most {MAX_BYTES}")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(config, dict):
        raise ValueError(f"expected an object with an architecture, got {_shown(config)}")
    # timm reads a file without "pretrained_cfg" as one that is its own.
    _check(config, ["architecture"], optional=["pretrained_cfg", "model_args"])
    check_model_args(config.get("model_args", {}), "model_args")
    return config


def check_model_args(arguments: Mapping[str, object], where: str) -> None:
    """Reject arguments that make timm read a file, or do not fit in memory; ValueError names the argument."""
    for name, value in arguments.items():
        argument = f"{where} {name if name.isidentifier() and len(name) <= 60 else _shown(name)}"
        if name in FORBIDDEN_ARGUMENTS or name.startswith(FORBIDDEN_PREFIXES):
            raise ValueError(f"{argument} cannot be set: it is not an argument of a network")
        _check_numbers(value, argument)


def check_pretrained_cfg(cfg: Mapping[str, Any]) -> None:
    """Check the entries used of timm's description of the weights: input, preprocessing, classes."""
    required = ("input_size", "crop_pct", "interpolation", "crop_mode", "mean", "std", "num_classes")
    optional = ("test_input_size", "test_crop_pct", "label_names", "fixed_input_size", "first_conv", "classifier")
    _check(cfg, required, optional=optional)
    for key in sorted(cfg.keys() - {"label_names", "label_descriptions"}):
        _check_numbers(cfg[key], key)


def check_trained_form(form: Mapping[str, Any]) -> None:
    """Check this package's record of the network and the pixel space of training."""
    required = ("architecture", "model_args", "image_size", "interpolation", "crop_pct", "upsample")
    _check(form, required, optional=["crop_mode"])
    check_model_args(form["model_args"], "model_args")


def check_metadata(metadata: Mapping[str, object]) -> None:
    """Check what this package reads of the metadata that came with a model; the rest may be anything."""
    used = ("norm", "epsilon", "test_fraction", "calibration", "trained_on", "dataset", "method")
    _check(metadata, (), optional=used)


def _check(values: Mapping[str, object], required: Sequence[str], *, optional: Sequence[str]) -> None:
    for key in (*required, *optional):
        value, rule = values.get(key), _RULES[key]
        if not (key in optional if value is None else rule.holds(value)):
            raise ValueError(f"{key} should be {rule.what}, got {_shown(value)}")


def _check_numbers(value: object, where: str, depth: int = 0) -> None:
    if depth > 8:
        raise ValueError(f"{where} is nested too deeply")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item, where, depth + 1)
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
        raise ValueError(f"{where} should hold numbers up to {MAX_NUMBER}, got {_shown(value)}")


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


class BuildLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count new tensors inside, and raise before taking the memory of one too many.

    A configuration can ask for any number of layers, channels and classes, but its weights have to be that size too:
    the network may be ``FACTOR`` times as large as ``weights``, its state dict, plus a margin; without weights, limits
    are fixed. ValueError is raised from inside.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.tensors = 0, 0
        self.max_bytes, self.max_tensors = UNKNOWN_BYTES, UNKNOWN_TENSORS
        if weights is not None:
            size = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in weights.values())
            self.max_bytes = FACTOR * size + MARGIN_BYTES
            self.max_tensors = FACTOR * len(weights) + MARGIN_TENSORS

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Count the tensors that ``func`` makes from sizes alone; those made from tensors are no larger than these."""
        options = kwargs or {}
        if not any(isinstance(value, Tensor) for value in (*args, *options.values())):
            self._count(args, options.get("dtype") or torch.get_default_dtype())
        return func(*args, **options)

    def _count(self, args: Sequence[Any], dtype: torch.dtype) -> None:
        sizes = [v for v in args if isinstance(v, list | tuple) and all(is_kind(item, int) for item in v)]
        numbers = [abs(v) for v in args if is_kind(v, float) and math.isfinite(v)]
        # A shape is a list; without one, linspace, arange and eye make as many as one of their numbers says.
        items = math.prod(sizes[0]) if sizes else max([1, *numbers])
        self.bytes += int(items) * dtype.itemsize
        self.tensors += 1
        if self.bytes > self.max_bytes or self.tensors > self.max_tensors:
            raise ValueError(
                f"the network it describes takes more than {self.max_bytes / 2**30:.3g} GiB or {self.max_tensors} "
                "tensors, which its weights do not fill"
            )
