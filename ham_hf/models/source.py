"""Resolve a model name: to a timm architecture, its arguments, its preprocessing, its weights and its origin.

Three kinds of names, as in timm: a registered architecture (``resnet18``, ``resnet18.a1_in1k``), a folder
(``local-dir:PATH``) and a model on the Hub (``hf-hub:me/model``, ``hf-hub:me/model@revision``). Weights are read from
safetensors alone: a source that offers only pickled weights is rejected. A card is untrusted text: only its first part
is read, and only short words are taken from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import PretrainedCfg, get_deprecated_models, get_pretrained_cfg, is_model
from timm.models._hub import download_from_hf, load_model_config_from_path
from torch import Tensor

from ham_hf.artifacts import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from ham_hf.files import front_matter
from ham_hf.hub_config import is_hub_id, split_revision
from ham_hf.models.cifar_nets import extract_from_resnet18
from ham_hf.models.untrusted import check_metadata, check_pretrained_cfg, check_trained_form, read_model_config

logger = logging.getLogger(__name__)

CONFIG_KEY = "ham_hf"
"""Top-level key of ``config.json`` under which this package keeps what timm has no place for."""
TRAINED_FORM_KEY = "trained_form"
"""Key inside ``CONFIG_KEY`` that holds a :class:`TrainedForm`; the keys beside it are the caller's."""
MAX_CARD_LENGTH = 2**20
UNKNOWN_LICENSE = "unknown"
"""The Hub's word for a license that is not stated."""

_HUB_PREFIXES = ("hf-hub", "hf_hub")
_FOLDER_PREFIX = "local-dir"
_PREPROCESSING = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
_WEIGHT_LOCATIONS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
_WORD = re.compile(r"[\w.:+-]{1,80}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class TrainedForm:
    """The network and the pixel space of training, which may differ from the published form.

    Attributes:
        architecture: timm name of the network that was trained.
        model_args: its arguments, but for the number of classes (older exports have it here too).
        image_size: of its input; this, interpolation, crop_pct and crop_mode are as in `Preprocessing`.
        upsample: nearest-neighbor enlargement per side in front of the published network; 1: none.
    """

    architecture: str
    model_args: dict[str, Any]
    image_size: int
    interpolation: str
    crop_pct: float
    upsample: int
    crop_mode: str = "center"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A resolved model name.

    Attributes:
        name: the name, as the user wrote it.
        architecture: name of the architecture in timm's registry.
        pretrained_cfg: timm's description of weights and preprocessing, without the places weights come from.
        model_args: arguments of the architecture that ``config.json`` records; empty for a registered name.
        extra: what ``config.json`` keeps under ``CONFIG_KEY``; empty if nothing.
        fetch: path of one of its files, by name; ValueError if there is none.
        trusted: True if the architecture and its arguments are timm's own, False if a ``config.json`` says them.
        hub_id: OWNER/NAME of the weights on the Hub; None if they are not there.
        embedded: whether the weights are those of plain ``resnet18`` that a CIFAR network was published as.
    """

    name: str
    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    extra: dict[str, Any]
    fetch: Callable[[str], Path]
    trusted: bool
    hub_id: str | None = None
    embedded: bool = False

    def trained_form(self) -> TrainedForm | None:
        """The network that was trained, if this package exported the model; ValueError if the record is damaged."""
        record = self.extra.get(TRAINED_FORM_KEY)
        if record is None:
            return None
        try:
            form = TrainedForm(**record)
            check_trained_form(record)
            _check_registered(form.architecture)
            return form
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name}: damaged {CONFIG_KEY}.{TRAINED_FORM_KEY} in {CONFIG_NAME}: {error}"
            ) from error

    def as_trained(self) -> ModelSource:
        """The source of the network that was trained: the CIFAR network if plain ``resnet18`` was published."""
        form = self.trained_form()
        if form is None:
            return self
        trained = {key: getattr(form, key) for key in ("architecture", "interpolation", "crop_pct", "crop_mode")}
        trained["input_size"] = (self.pretrained_cfg["input_size"][0], form.image_size, form.image_size)
        return dataclasses.replace(
            self,
            architecture=form.architecture,
            model_args=form.model_args,
            pretrained_cfg=self.pretrained_cfg | trained,
            embedded=form.upsample != 1,
        )

    def read_weights(self) -> dict[str, Tensor]:
        """The state dict; ValueError if there is none in safetensors, or it is damaged or not of the network."""
        weights = self.fetch(WEIGHTS_NAME)
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(
                f"{self.name}: {weights} is damaged, or a Git LFS pointer instead of the file itself ({error})"
            ) from error
        try:
            return extract_from_resnet18(state) if self.embedded else state
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.name} cannot be turned back into its CIFAR network: {error}") from error


def resolve_source(name: str) -> ModelSource:
    """Resolve a model name; reads ``config.json``, but no weights.

    Args:
        name: ``ARCHITECTURE``, ``ARCHITECTURE.TAG``, ``local-dir:PATH`` or ``hf-hub:OWNER/NAME[@REVISION]``.

    Raises:
        ValueError: if there is no such model; the message has the nearest names, or the missing file and its place.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix == _FOLDER_PREFIX:
        folder = Path(rest).expanduser()
        return _source_from_folder(name, folder, partial(_file_in_folder, name, folder))
    if colon and prefix in _HUB_PREFIXES:
        folder = _download(name, rest, CONFIG_NAME).parent
        source = _source_from_folder(name, folder, partial(_download, name, rest))
        return dataclasses.replace(source, hub_id=rest.partition("@")[0])
    if "/" in name or "\\" in name:
        raise ValueError(
            f"model name {name!r}: write hf-hub:{name} for a model on the Hub, local-dir:{name} for a folder"
        )
    return _source_from_registry(name)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from.

    Attributes:
        license: of its weights, a Hub license id; `UNKNOWN_LICENSE` if neither card nor ``config.json`` says it.
        base_model: its id on the Hub or, for a folder, the base model that its card names; None if there is neither.
        tags: of its card.
    """

    license: str
    base_model: str | None
    tags: tuple[str, ...]


def read_origin(source: str, *, revision: str | None = None) -> Origin:
    """Read card and ``config.json`` of a model, named as for `load_pixel_model`; ValueError if there is none."""
    resolved = resolve_source(complete_name(source, revision))
    card = _card_metadata(resolved)
    licenses = _matching(_WORD.fullmatch, [card.get("license"), resolved.pretrained_cfg.get("license")])
    bases = _matching(partial(is_hub_id, with_owner=True), [resolved.hub_id, *_as_list(card.get("base_model"))])
    return Origin(
        license=licenses[0].lower() if licenses else UNKNOWN_LICENSE,
        base_model=bases[0] if bases else None,
        tags=tuple(_matching(_WORD.fullmatch, _as_list(card.get("tags"))[:100])),
    )


def _card_metadata(source: ModelSource) -> dict[str, Any]:
    """The YAML block at the beginning of a model's card; empty, with a line in the log, where none can be read."""
    try:
        with source.fetch(CARD_NAME).open(encoding="utf-8", errors="replace") as file:
            values = yaml.safe_load(front_matter(file.read(MAX_CARD_LENGTH)))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        logger.warning("no card is carried over: %s", " ".join(str(error).split())[:200])
        return {}
    return values if isinstance(values, dict) else {}


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _matching(accepts: Callable[[str], object], values: Iterable[object]) -> list[str]:
    return [value for value in values if isinstance(value, str) and accepts(value)]


def complete_name(source: str, revision: str | None = None) -> str:
    """Turn a user's name for a model into one for :func:`resolve_source`.

    Args:
        source: a name with prefix, a timm name, a folder, or ``OWNER/NAME`` on the Hub. A registered timm name wins
            over a folder of the same name.
        revision: branch, tag or commit; only for a model on the Hub.

    Raises:
        ValueError: if it is none of these, or a revision is given for something that has none.
    """
    prefix, colon, _ = source.partition(":")
    if (colon and prefix in (_FOLDER_PREFIX, *_HUB_PREFIXES)) or is_model(source):
        name = source
    elif Path(source).expanduser().is_dir():
        name = f"{_FOLDER_PREFIX}:{source}"
    elif split_revision(source):
        name = f"{_HUB_PREFIXES[0]}:{source}"
    else:
        raise ValueError(
            f"{source!r} is neither a folder, nor OWNER/NAME on the Hub, nor a timm model{_nearest(source)}"
        )
    if revision is None:
        return name
    if not name.startswith(_HUB_PREFIXES) or "@" in name:
        raise ValueError(f"revision {revision!r} goes with OWNER/NAME on the Hub, and only once; got {source!r}")
    return f"{name}@{revision}"


def _source_from_registry(name: str) -> ModelSource:
    architecture = name.split(".", 1)[0]
    if (current := get_deprecated_models().get(architecture)) is not None:
        raise ValueError(f"--model_name {name}: timm renamed it to {current}")
    if not is_model(name):
        raise ValueError(f"--model_name {name} is not registered with timm{_nearest(architecture)}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_models(f"{architecture}.*", include_tags=True)
        raise ValueError(f"--model_name {name}: no such tag; timm has {', '.join(tags)}") from error
    cfg = cfg or PretrainedCfg(architecture=architecture)

    def fetch(filename: str) -> Path:
        if cfg.hf_hub_id:
            return _download(name, cfg.hf_hub_id, filename)
        if cfg.has_weights:
            raise ValueError(f"{name}: its pretrained weights exist only as a pickle, which is never loaded")
        raise ValueError(f"{name}: timm has no pretrained weights for it; train from scratch or choose another model")

    return ModelSource(
        name=name,
        architecture=architecture,
        pretrained_cfg=_as_dict(cfg),
        model_args={},
        extra={},
        fetch=fetch,
        trusted=True,
        hub_id=cfg.hf_hub_id or None,
    )


def _source_from_folder(name: str, folder: Path, fetch: Callable[[str], Path]) -> ModelSource:
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():
        what = f"has no {CONFIG_NAME}" if folder.is_dir() else "is not a folder"
        hint = ""
        if folder.is_dir() and (parent := folder.resolve().parent / CONFIG_NAME).is_file():
            hint = f". The folder above has them, which holds the exported model of a run: try {parent.parent}"
        raise ValueError(
            f"{name}: {folder} {what}; expected {CONFIG_NAME} and {WEIGHTS_NAME} as timm writes them{hint}"
        )
    try:
        config = read_model_config(config_file)
        cfg, architecture, model_args = load_model_config_from_path(folder)
        # As in timm, a null means that it is not said.
        cfg = {key: value for key, value in cfg.items() if value is not None or key not in _PREPROCESSING}
        pretrained_cfg = _as_dict(PretrainedCfg(**{**cfg, "architecture": architecture}))
        check_pretrained_cfg(pretrained_cfg)
        extra = config.get(CONFIG_KEY, {})
        check_metadata(extra)
        _check_registered(architecture)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else ascii(error)[:300]
        raise ValueError(f"{name}: {CONFIG_NAME} is not one of a timm model: {reason}") from error
    return ModelSource(
        name=name,
        architecture=architecture,
        pretrained_cfg=pretrained_cfg,
        model_args=model_args,
        extra=extra,
        fetch=fetch,
        trusted=False,
    )


def _check_registered(architecture: str) -> None:
    """Refuse a name that timm would look up elsewhere, such as ``hf-hub:...``, or does not know."""
    if not architecture.isprintable() or ":" in architecture or "/" in architecture or not is_model(architecture):
        raise ValueError(
            f"timm {timm.__version__} has no architecture {ascii(architecture)[:100]}{_nearest(architecture[:100])}"
        )


def _file_in_folder(name: str, folder: Path, filename: str) -> Path:
    path = folder / filename
    if not path.is_file():
        hint = "; pickled weights (.bin, .pth) are never loaded" if filename == WEIGHTS_NAME else ""
        raise ValueError(f"{name}: {folder} has no {filename}{hint}")
    return path


def _download(name: str, hub_id: str, filename: str) -> Path:
    try:
        return Path(download_from_hf(hub_id, filename))
    except Exception as error:
        # No such repository, no such file, no access, no network: the client, which changed twice, has its own types.
        if filename == WEIGHTS_NAME:
            hint = "; pickled weights are never loaded" if "not found" in str(error).lower() else ""
        else:
            hint = "" if Path(hub_id).exists() else ", and there is no folder of that name"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: could not get {filename} of {hub_id} from the Hub{hint} ({reason})") from error


def _as_dict(cfg: PretrainedCfg) -> dict[str, Any]:
    """A ``pretrained_cfg`` that cannot make timm fetch or unpickle anything by itself."""
    values = dataclasses.asdict(cfg) | dict.fromkeys(_WEIGHT_LOCATIONS) | {"custom_load": False}
    return {key: value for key, value in values.items() if value is not None}


def _nearest(name: str) -> str:
    names = difflib.get_close_matches(name.lower(), timm.list_models(), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(names)}" if names else "; timm.list_models() lists them"
