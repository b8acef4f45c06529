"""Datasets of image files: class folders, or tables with labels beside images; in a folder, zip archives, or the Hub.

``datasets`` puts files into splits by words anywhere in their paths, and names the classes of archives by the folder
that an archive is in. Here the files are listed anew. An archive is a folder of its own name, without ``.zip``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import datasets
import fsspec

from ham_hf.data.class_folders import (
    DATA_EXTENSIONS,
    METADATA_NAMES,
    is_hidden,
    is_image_name,
    list_files,
    note,
    note_unnamed_images,
    refuse_repeated,
    shown,
    sort_into_classes,
)
from ham_hf.data.image_tables import read_image_tables

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The files of a dataset.

    Attributes:
        where: of each path, relative and with ``/``, the file or URL.
        download: from URLs to files, in order; None for files of this machine.
        split_of: splits of files as the dataset's README.md declares them; None if it does not.
        notes: what is not read, each with its number and an example.
    """

    where: Mapping[str, str]
    download: Callable[[list[str]], list[str]] | None = None
    split_of: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    def fetch(self, paths: Sequence[str]) -> Mapping[str, str]:
        """Files on this machine."""
        remote = [path for path in paths if self.download is not None and "://" in self.where[path]]
        stored = self.download([self.where[path] for path in remote]) if self.download and remote else []
        found = dict(zip(remote, map(str, stored), strict=True))
        return {path: found.get(path, self.where[path]) for path in paths}


def files_of_folder(root: Path) -> ImageFiles:
    """Every file below a folder, also behind links."""
    paths, notes = list_files(root)
    return ImageFiles(where={path: str(root.absolute() / path) for path in paths}, notes=tuple(notes))


def holds_images(files: ImageFiles) -> bool:
    """Whether the files of a folder of this machine are images, themselves or in zip archives, rather than other data.

    Raises:
        ValueError: for an archive that cannot be read.
    """
    visible = [path for path in files.where if not is_hidden(path)]
    images = sum(map(is_image_name, visible))
    data = [path for path in visible if path.lower().endswith(DATA_EXTENSIONS)]
    if images or not data or not all(path.lower().endswith(".zip") for path in data):
        return images > len(data)
    names = [name for path in data for name in _names_in(path, files.where[path]) if not is_hidden(name)]
    return sum(map(is_image_name, names)) > sum(name.lower().endswith(DATA_EXTENSIONS) for name in names)


def files_of_builder(
    builder: datasets.DatasetBuilder, *, splits_declared: bool, only_configuration: bool
) -> ImageFiles:
    """Every file of the dataset that a builder of ``datasets`` would read.

    Args:
        builder: opened, nothing prepared.
        splits_declared: whether the dataset's README.md says which files its configuration has.
        only_configuration: whether no other configuration may have the remaining files.
    """
    root = "/".join(part for part in (str(builder.base_path).rstrip("/"), builder.config.data_dir) if part)
    if "://" in root:
        settings = datasets.DownloadConfig(token=builder.token)
        manager = datasets.DownloadManager(dataset_name=builder.dataset_name, download_config=settings)
        where = {path: f"{root}/{path}" for path in list_repository(root)}
        files = ImageFiles(where=where, download=manager.download)
    else:
        files = files_of_folder(Path(root))
    if not splits_declared:
        return files
    path_of = {file: path for path, file in files.where.items()}
    split_of = {}
    for split, declared in builder.config.data_files.items():
        for file in map(str, declared):
            split_of[path_of.get(file, file)] = str(split)
    where = {**files.where, **{path: path for path in split_of if path not in files.where}}
    others = [path for path in where if is_image_name(path) and not is_hidden(path) and path not in split_of]
    unread = others if only_configuration else []
    notes = note(unread, "image files are in no data_files of README.md and are not read")
    return ImageFiles(where=where, download=files.download, split_of=split_of, notes=(*files.notes, *notes))


def list_repository(root: str) -> list[str]:
    """Every file below a URL, as paths relative to it."""
    filesystem, start = fsspec.url_to_fs(root)
    return [path[len(start) :].lstrip("/") for path in filesystem.find(start, expand_info=False)]


def read_image_files(files: ImageFiles) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """Images with labels, by tables where there are any, else by class folders; and notes on what is not read.

    Raises:
        ValueError: as `sort_into_classes` and `read_image_tables` do, for an archive that cannot be unpacked, and if
            there is no image.
    """
    files = _unpacked(files)
    paths = list(files.where)
    usable = paths if files.split_of is None else [path for path in paths if path in files.split_of]
    tables = [path for path in usable if PurePosixPath(path).name in METADATA_NAMES and not is_hidden(path)]
    if tables:
        splits, notes = read_image_tables(paths, tables, files.split_of, files.fetch)
    else:
        found = sort_into_classes(paths, files.split_of)
        images = [path for of_split in found.splits.values() for path, _ in of_split]
        splits, notes = found.as_dataset(files.fetch(images)), list(found.notes)
    if not splits:
        raise ValueError("it has no image that is not hidden")
    if files.download is None and not tables:
        notes += note_unnamed_images(files.where)
    noted = (*files.notes, *notes)
    for sentence in noted:
        logger.warning("%s", sentence)
    return splits, noted


def _unpacked(files: ImageFiles) -> ImageFiles:
    """With the files of zip archives in their place, where all images are in archives."""
    visible = [path for path in files.where if not is_hidden(path)]
    archives = [path for path in visible if path.lower().endswith(".zip")]
    if not archives or any(map(is_image_name, visible)):
        return files
    where = {path: file for path, file in files.where.items() if path not in archives}
    split_of = None if files.split_of is None else dict(files.split_of)
    for archive, file in files.fetch(archives).items():
        root = _unpack(archive, file)
        folder = archive[: -len(".zip")]
        for path in list_files(root)[0]:
            where[f"{folder}/{path}"] = str(root / path)
            if split_of is not None and archive in split_of:
                split_of[f"{folder}/{path}"] = split_of[archive]
    return ImageFiles(where=where, download=files.download, split_of=split_of, notes=files.notes)


def _unpack(archive: str, file: str) -> Path:
    """The folder in the cache of ``datasets`` that holds the files of an archive; another version has another."""
    status = os.stat(file)
    key = f"{os.path.realpath(file)}\n{status.st_size}\n{status.st_mtime_ns}"
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "ham_hf_archives"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    refuse_repeated([f"{archive}/{name}" for name in _names_in(archive, file)])
    cache.mkdir(parents=True, exist_ok=True)
    with _explained(archive), zipfile.ZipFile(file) as opened, tempfile.TemporaryDirectory(dir=cache) as part:
        opened.extractall(f"{part}/files")
        try:
            os.rename(f"{part}/files", folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _names_in(archive: str, file: str) -> list[str]:
    with _explained(archive), zipfile.ZipFile(file) as opened:
        return opened.namelist()


@contextmanager
def _explained(archive: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the archive {shown(archive)} cannot be unpacked ({error}): repair it") from error
