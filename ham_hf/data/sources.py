"""Open the digits, a local folder or a dataset of the Hub, with a local copy or as a stream.

The digits come with the package, so the first run needs neither network nor download. They are the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998; CC BY
4.0): see ``digits.LICENSE.md`` beside the file.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import datasets
import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from ham_hf.data.class_folders import DATA_EXTENSIONS, METADATA_NAMES, is_hidden, is_image_name, note
from ham_hf.data.config import DataConfig
from ham_hf.data.declarations import Declarations, StreamError, names_in, read_file_classes, read_schema
from ham_hf.data.image_files import files_below, files_of_builder, holds_images, read_image_files
from ham_hf.data.shards import SplitFiles
from ham_hf.files import front_matter
from ham_hf.hub_config import DEFAULT_REVISION, is_hub_id

logger = logging.getLogger(__name__)
Split = TypeVar("Split", datasets.Dataset, SplitFiles)

DIGITS = "digits"
MAX_README_BYTES = 2**22
STREAMED_BUILDERS = {"Parquet", "WebDataset"}


class CacheError(ValueError):
    """The cache of ``datasets`` cannot be written; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Source(Generic[Split]):
    """An opened dataset.

    Attributes:
        splits: every split, by name: its rows, or the files that a stream reads.
        config_name: the configuration that was opened; as given for local data.
        revision: its commit, if known, else the revision asked for; None for local data.
        notes: images and files of it that are left out, each kind with its number and an example.
        declared: the class names that its files declare.
    """

    splits: Mapping[str, Split]
    config_name: str | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()
    declared: Declarations = field(default_factory=Declarations)


def open_source(config: DataConfig) -> Source[datasets.Dataset]:
    """Open ``digits``, a local folder (parquet, class folders, ``save_to_disk``) or a dataset of the Hub.

    An existing folder wins over a dataset of the Hub with the same name. ValueError if it cannot be opened; the
    message names the setting and the fix, the cause is kept.
    """
    name, config_name, local = config.dataset_name, config.dataset_config_name, _check_name(config)
    if name == DIGITS:
        return Source(splits=_digits())
    folder = os.path.expanduser(name)
    with _explained(config, local=local):
        if local and _is_saved(folder):
            saved = datasets.load_from_disk(folder).with_format(None)  # torch's or numpy's is stored with it
            splits = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
            return Source(splits=splits)
        if local and config_name is None and not _declared_configs(folder):
            files = files_below(folder)
            if holds_images(files):
                if not any(map(is_image_name, files.where)):
                    check_cache()  # archives are unpacked there
                splits, notes = read_image_files(files)
                return Source(splits=splits, notes=notes)
        builder, opened, commit = _builder(config, local=local)
        configs = _declared_configs(str(builder.base_path))
        declares = any("data_files" in own for own in configs if own.get("config_name") == builder.config.name)
        images = _reads_image_files(builder)
        if declares or not images:
            _refuse_repeated_files(builder)
        if images:
            files = files_of_builder(builder, splits_declared=declares, only_configuration=len(configs) == 1)
            splits, notes = read_image_files(files)
            return Source(splits=splits, notes=notes, config_name=opened, revision=commit)
        unread = _note_unread_files(builder)
        declared = _declarations(builder)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    if not local:
        _refuse_files_of_this_machine(name, splits)
    return Source(splits=splits, notes=tuple(unread), declared=declared, config_name=opened, revision=commit)


def open_streamed_source(config: DataConfig) -> Source[SplitFiles]:
    """Open parquet files or WebDataset archives, in a local folder or of the Hub, to be read as streams.

    ValueError if it cannot be opened or its layout is neither; the message names the fix.
    """
    name, local = config.dataset_name, _check_name(config)
    if name == DIGITS:
        raise _not_streamed(name, "the digits of the package")
    if local and _is_saved(os.path.expanduser(name)):
        raise _not_streamed(name, "a folder written by save_to_disk")
    with _explained(config, local=local, passing=StreamError):
        builder, opened, commit = _builder(config, local=local)
    if not _kinds(builder) & STREAMED_BUILDERS:
        raise _not_streamed(name, f"read by datasets' {type(builder).__mro__[1].__name__}")
    with _explained(config, local=local, passing=StreamError):
        _refuse_repeated_files(builder)
        _note_unread_files(builder)
        declared = _declarations(builder)
        streams = builder.as_streaming_dataset()
    splits = {
        str(split): SplitFiles(
            split=str(split),
            files=tuple(map(str, files)),
            version=str(files.origin_metadata),
            stream=streams[str(split)],
            num_rows=tuple(file.num_rows for file in declared.files[str(split)]) if declared.files else None,
        )
        for split, files in builder.config.data_files.items()
    }
    return Source(splits=splits, declared=declared, config_name=opened, revision=commit)


def _not_streamed(name: str, layout: str) -> ValueError:
    return ValueError(
        f"--dataset_streaming: --dataset_name {name} is {layout}, and only parquet files and WebDataset archives "
        "(.tar) are streamed; leave it out, or convert the dataset (push_to_hub writes parquet)"
    )


def _kinds(builder: datasets.DatasetBuilder) -> set[str]:
    """Names of the builder's class and its bases."""
    return {kind.__name__ for kind in type(builder).__mro__}


def _reads_image_files(builder: datasets.DatasetBuilder) -> bool:
    """Whether a builder reads image files and README.md asks for nothing but splits."""
    asked = ("drop_labels", "drop_metadata", "metadata_filenames", "filters")
    return "ImageFolder" in _kinds(builder) and all(getattr(builder.config, option, None) is None for option in asked)


def _front_matter(base: str) -> str:
    """The YAML at the top of a dataset's README.md; empty without."""
    try:
        with fsspec.open(f"{base}/README.md", "rb") as file:
            return front_matter(file.read(MAX_README_BYTES).decode(errors="replace"))
    except FileNotFoundError:
        return ""


def _declared_configs(base: str) -> list[dict[str, object]]:
    """The configurations that the front matter of a dataset's README.md declares."""
    try:
        values = yaml.safe_load(_front_matter(base))
    except yaml.YAMLError:
        return []  # datasets, which reads it next, explains the error
    configs = values.get("configs") if isinstance(values, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _check_names_in_readme(base: str) -> None:
    """Reject class names of README.md that YAML reads as something else: no is False, 1.10 is 1.1, 007 is 7."""
    front = _front_matter(base)
    written, read = (list(_leaves(yaml.load(front, loader))) for loader in (yaml.BaseLoader, yaml.SafeLoader))  # noqa: S506
    for name, value in zip(written, read, strict=True):
        if str(value) != name:
            raise ValueError(f"README.md declares the class {name}, which YAML reads as {value!r}: put it in quotes")


def _leaves(node: object, of_names: bool = False) -> Iterator[object]:
    """Names of all ``class_label`` below a node of YAML, in order."""
    if isinstance(node, dict):
        for key, below in node.items():
            yield from _leaves(below, of_names or (key == "class_label"))
    elif isinstance(node, list):
        for below in node:
            yield from _leaves(below, of_names)
    elif of_names:
        yield node


def _refuse_repeated_files(builder: datasets.DatasetBuilder) -> None:
    """Raise ValueError naming a file that is listed twice, and its splits."""
    splits_of: dict[str, list[str]] = {}
    for split, files in (builder.config.data_files or {}).items():
        for file in files:
            # A table of file names and labels may serve several splits.
            if os.path.basename(file) not in METADATA_NAMES:
                splits_of.setdefault(str(file), []).append(str(split))
    for file, splits in splits_of.items():
        if len(splits) > 1:
            where = " and ".join(map(repr, Counter(splits))) + (" twice" if len(set(splits)) == 1 else "")
            raise ValueError(f"the file {file} is listed in {where}: list each file once, in one split (README.md)")


def _note_unread_files(builder: datasets.DatasetBuilder) -> list[str]:
    """Warn of files that could be read and are in no split, unless another configuration may have them."""
    base, listed = str(builder.base_path).rstrip("/"), builder.config.data_files or {}
    configs = _declared_configs(base)
    if not listed or len(configs) > 1:
        return []

    def place(file: str) -> str:
        return file if "://" in base else os.path.realpath(file)

    read = {place(str(file)) for files in listed.values() for file in files}
    kinds = tuple({os.path.splitext(file)[1].lower() for file in read} & set(DATA_EXTENSIONS))
    found = files_below(base)
    missing = [
        path
        for path, file in found.where.items()
        if not is_hidden(path) and path.lower().endswith(kinds) and place(file) not in read
    ]
    why = "are in no data_files of README.md" if configs else "belong to no split by their names"
    notes = [*found.notes, *note(missing, f"files {why} and are not read")]
    for sentence in notes:
        logger.warning("%s", sentence)
    return notes


def _declarations(builder: datasets.DatasetBuilder) -> Declarations:
    """Class names that README.md and each parquet or Arrow file of a builder declare.

    Where they differ, the builder gets the widest declaration, which every file's labels fit into.
    """
    data_files = (builder.config.data_files or {}) if {"Parquet", "Arrow"} & _kinds(builder) else {}
    declared = Declarations(
        readme=names_in(builder.info.features),
        files={
            str(split): read_file_classes(list(map(str, files)), str(files.origin_metadata))
            for split, files in data_files.items()
        },
    )
    widest = declared.widest()
    if widest:
        features = builder.info.features
        if features is None:
            schema, _ = read_schema(next(str(file) for files in data_files.values() for file in files))
            features = datasets.Features.from_arrow_schema(schema)
        builder.info.features = datasets.Features({**features, **{k: v for k, v in widest.items() if k in features}})
    return declared


def check_cache() -> None:
    """Raise CacheError if the cache of ``datasets`` cannot be written: later it would look like a data error."""
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CacheError(
            f"the cache folder {folder} cannot be written ({error.strerror or error}): datasets are prepared there; "
            "set HF_HOME or HF_DATASETS_CACHE to a folder that can be written, or make room in it"
        ) from error


def _refuse_files_of_this_machine(name: str, splits: datasets.DatasetDict) -> None:
    """Reject a Hub dataset whose rows name files outside of the cache; training would read and show them."""
    caches = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HUGGINGFACE_HUB_CACHE")]
    caches += [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE]
    roots = [Path(cache).expanduser().resolve() for cache in caches if cache]
    for split, rows in splits.items():
        for column, feature in rows.features.items():
            kind = rows.data.schema.field(column).type
            if not isinstance(feature, datasets.Image | dict) or not pa.types.is_struct(kind):
                continue
            if {"bytes", "path"} - {kind.field(number).name for number in range(kind.num_fields)}:
                continue
            stored = rows.data.table.column(column)
            paths = pc.struct_field(stored, "path")
            for row in pc.indices_nonzero(pc.is_null(pc.struct_field(stored, "bytes"))).to_pylist():
                path = paths[row].as_py()
                if path is not None and not any(Path(path).resolve().is_relative_to(root) for root in roots):
                    raise ValueError(
                        f"--dataset_name {name}: split {split!r}, row {row} holds no image, it names the file "
                        f"{path!r} of this machine, which a dataset of the Hub may not; choose another dataset"
                    )


def is_local(name: str) -> bool:
    """Whether ``name`` is the digits or something on this machine."""
    return name == DIGITS or Path(name).expanduser().exists()


def _check_name(config: DataConfig) -> bool:
    """`is_local`; ValueError for a name that is neither that nor a Hub id, or an impossible configuration."""
    name, config_name, revision = config.dataset_name, config.dataset_config_name, config.dataset_revision
    local = is_local(name)
    if local and revision is not None:
        raise ValueError(f"--dataset_revision {revision}: only datasets of the Hub have revisions, {name!r} is local")
    if config_name is not None and (name == DIGITS or _is_saved(os.path.expanduser(name))):
        raise ValueError(f"--dataset_config_name {config_name}: {name!r} has no configurations; leave it out")
    if name != DIGITS and Path(name).expanduser().is_file():
        raise ValueError(f"--dataset_name {name}: is a file; give the folder that contains it")
    if not local and not is_hub_id(name):
        raise ValueError(
            f"--dataset_name {name}: there is no such folder, and it is not a Hub id either (expected 'owner/name')"
        )
    return local


def _is_saved(folder: str) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    return any(os.path.isfile(f"{folder}/{file}") for file in ("dataset_dict.json", "state.json"))


def _builder(config: DataConfig, *, local: bool) -> tuple[datasets.DatasetBuilder, str | None, str | None]:
    """The builder of ``datasets`` for it, nothing prepared; and the configuration and the commit that it reads."""
    check_cache()
    path = os.path.realpath(os.path.expanduser(config.dataset_name)) if local else config.dataset_name
    builder = datasets.load_dataset_builder(path, config.dataset_config_name, revision=config.dataset_revision)
    _check_names_in_readme(str(builder.base_path))
    if local:
        return builder, config.dataset_config_name, None
    commit = builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else config.dataset_revision
    return builder, builder.config.name, commit


@contextmanager
def _explained(config: DataConfig, *, local: bool, passing: type[Exception] = CacheError) -> Iterator[None]:
    """Turn any error into a ValueError that names the setting and the fix; CacheError and ``passing`` have both."""
    try:
        yield
    except (CacheError, passing):
        raise
    except Exception as error:
        # Network, Hub, file format: dozens of exception types, and all of them end the run.
        raise ValueError(_explanation(error, config, local=local)) from error


def _explanation(error: Exception, config: DataConfig, *, local: bool) -> str:
    name = config.dataset_name
    # A DatasetGenerationError says that generating failed; its cause says why.
    failed = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
    text = str(failed or error).split("\nExample of usage")[0]
    if text.startswith("Some label names are duplicated"):
        text += " They are declared in README.md, where YAML reads 1.10 as 1.1 and 007 as 7 unless they are in quotes."
    # datasets raises a plain ValueError if the configuration is missing or unknown, and lists those there are.
    if type(error) is ValueError and "config" in text.lower():
        return f"--dataset_config_name {config.dataset_config_name or '(not given)'}, of --dataset_name {name}: {text}"
    if local:
        return f"--dataset_name {name}: this folder cannot be read as parquet files or class folders: {text}"
    if isinstance(error, ConnectionError):
        return (
            f"--dataset_name {name}: there is no such local folder, the Hub cannot be reached and its cache has no "
            f"copy; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder ({text})"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        revision = config.dataset_revision or DEFAULT_REVISION
        return (
            f"--dataset_name {name}, --dataset_revision {revision}: {text} Check the id; a "
            "private or gated dataset needs `hf auth login` or HF_TOKEN; there is no local folder of that name either"
        )
    return f"--dataset_name {name} cannot be loaded: {type(error).__name__}: {text}"


def _digits() -> datasets.DatasetDict:
    """The handwritten digits of the package: 1,797 gray 8x8 images, stretched to 0..255, one split."""
    images, labels = read_digits()
    pixels = np.round(images * (255 / LARGEST_DIGIT_VALUE)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {"image": list(pixels), "label": labels}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features))


DIGITS_FILE = Path(__file__).with_name("digits.npz")
LARGEST_DIGIT_VALUE = 16
"""The largest value of a pixel: each counts the black dots of a block of 4 x 4."""


def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (1797, 8, 8) with values 0..16, and labels (1797,) 0..9; the order is that of scikit-learn's copy."""
    with np.load(DIGITS_FILE) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)
