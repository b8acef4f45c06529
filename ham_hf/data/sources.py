"""Where the examples come from: the digits, a local folder or the Hub, with a local copy or as a stream."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ham_hf.hub_ids import is_hub_id

DIGITS = "digits"
STREAMED_BUILDERS = {"Parquet", "WebDataset"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened dataset.

    Attributes:
        splits: every split, by name.
        config_name: the configuration that was opened; as given for local data.
        revision: its commit, if known, else the revision asked for; None for local data.
    """

    splits: datasets.DatasetDict
    config_name: str | None
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class StreamedSource:
    """A dataset opened without a local copy.

    Attributes:
        splits: every split, by name.
        files: of each split the parquet files or tar archives, in order; paths or URLs.
        versions: of each split what tells one version of its files from another.
        config_name: the configuration that was opened; as given for local data.
        revision: its commit, if known, else the revision asked for; None for local data.
    """

    splits: Mapping[str, datasets.IterableDataset]
    files: Mapping[str, tuple[str, ...]]
    versions: Mapping[str, str]
    config_name: str | None
    revision: str | None


def open_source(name: str, config_name: str | None, revision: str | None) -> Source:
    """Open ``digits``, a local folder (parquet, class folders, ``save_to_disk``) or a dataset of the Hub.

    An existing folder goes before a dataset of the Hub with the same name.

    Raises:
        ValueError: if it cannot be opened; the message names the setting and the way out, the cause is kept.
    """
    local = _is_local(name, config_name, revision)
    if name == DIGITS:
        return Source(splits=_digits(), config_name=None, revision=None)
    try:
        if local and _is_saved(Path(name).expanduser()):
            saved = datasets.load_from_disk(str(Path(name).expanduser()))
            splits = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
            return Source(splits=splits, config_name=config_name, revision=None)
        # The two halves of load_dataset; the builder knows which commit of the Hub it reads.
        builder = _builder(name, config_name, revision, local=local)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as error:
        # Network, Hub, file format: dozens of exception types, and all of them end the run.
        raise ValueError(_explain(error, name, config_name, revision, local=local)) from error
    if not local:
        _refuse_files_of_this_machine(name, splits)
    opened, commit = _opened(builder, config_name, revision, local=local)
    return Source(splits=splits, config_name=opened, revision=commit)


def open_streamed_source(name: str, config_name: str | None, revision: str | None) -> StreamedSource:
    """Open parquet files or WebDataset archives, in a local folder or of the Hub, to be read as streams.

    Raises:
        ValueError: if it cannot be opened or has another layout; the message names the way out.
    """
    local = _is_local(name, config_name, revision)
    layout = "scikit-learn's digits" if name == DIGITS else ""
    if local and _is_saved(Path(name).expanduser()):
        layout = "a folder written by save_to_disk"
    if not layout:
        try:
            builder = _builder(name, config_name, revision, local=local)
            splits = builder.as_streaming_dataset()
        except Exception as error:
            raise ValueError(_explain(error, name, config_name, revision, local=local)) from error
        kinds = {kind.__name__ for kind in type(builder).__mro__}
        layout = "" if kinds & STREAMED_BUILDERS else f"read by datasets' {type(builder).__mro__[1].__name__}"
    if layout:
        raise ValueError(
            f"--dataset_streaming: --dataset_name {name} is {layout}, and only parquet files and WebDataset archives "
            "(.tar) are streamed; leave it out, or convert the dataset (push_to_hub writes parquet)"
        )
    files = {str(split): tuple(map(str, found)) for split, found in builder.config.data_files.items()}
    versions = {str(split): str(found.origin_metadata) for split, found in builder.config.data_files.items()}
    opened, commit = _opened(builder, config_name, revision, local=local)
    return StreamedSource(splits=splits, files=files, versions=versions, config_name=opened, revision=commit)


def _refuse_files_of_this_machine(name: str, splits: datasets.DatasetDict) -> None:
    """Refuse a dataset of the Hub whose rows name files outside of the cache instead of holding images.

    They would be read, and a few are drawn in a figure that is published.

    Raises:
        ValueError: naming split, row and file.
    """
    caches = {datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE}
    caches |= {
        os.environ[variable] for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if variable in os.environ
    }
    roots = [Path(cache).expanduser().resolve() for cache in caches]
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


def _is_local(name: str, config_name: str | None, revision: str | None) -> bool:
    """Whether ``name`` is the digits or a folder.

    Raises:
        ValueError: if it is neither that nor a Hub id, or has a configuration or revision that cannot be.
    """
    folder = Path(name).expanduser()
    local = name == DIGITS or folder.exists()
    if local and revision is not None:
        raise ValueError(f"--dataset_revision {revision}: only datasets of the Hub have revisions, {name!r} is local")
    if name == DIGITS and config_name is not None:
        raise ValueError(f"--dataset_config_name {config_name}: 'digits' has no configurations; leave it out")
    if name != DIGITS and folder.is_file():
        raise ValueError(f"--dataset_name {name}: is a file; give the folder that contains it")
    if not local and not is_hub_id(name):
        raise ValueError(
            f"--dataset_name {name}: there is no such folder, and it is not a Hub id either (expected 'owner/name')"
        )
    return local


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _builder(name: str, config_name: str | None, revision: str | None, *, local: bool) -> datasets.DatasetBuilder:
    path = str(Path(name).expanduser().resolve()) if local else name
    return datasets.load_dataset_builder(path, config_name, revision=revision)


def _opened(
    builder: datasets.DatasetBuilder, config_name: str | None, revision: str | None, *, local: bool
) -> tuple[str | None, str | None]:
    """The configuration and the commit that were opened."""
    if local:
        return config_name, None
    return builder.config.name, builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else revision


def _explain(error: Exception, name: str, config_name: str | None, revision: str | None, *, local: bool) -> str:
    # A DatasetGenerationError says that generating failed; its cause says why.
    failed = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
    text = str(failed or error).split("\nExample of usage")[0]
    # datasets raises a plain ValueError if the configuration is missing or unknown, and lists those there are.
    if type(error) is ValueError and "config" in text.lower():
        return f"--dataset_config_name {config_name or '(not given)'}, of --dataset_name {name}: {text}"
    if local:
        return f"--dataset_name {name}: this folder cannot be read as parquet files or class folders: {text}"
    if isinstance(error, ConnectionError):
        return (
            f"--dataset_name {name}: there is no such local folder, the Hub cannot be reached and its cache has no "
            f"copy; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder ({text})"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"--dataset_name {name}, --dataset_revision {revision or 'main'}: {text} Check the id; a private or gated "
            "dataset needs `hf auth login` or HF_TOKEN; there is no local folder of that name either"
        )
    return f"--dataset_name {name} cannot be loaded: {type(error).__name__}: {text}"


def _digits() -> datasets.DatasetDict:
    """scikit-learn's handwritten digits: 1,797 gray 8x8 images with values 0..16, one split."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {"image": list(pixels), "label": scans.target}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features))
