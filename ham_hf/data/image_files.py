"""Read image files in a folder, zip archives or the Hub: class folders, or tables with labels beside the images.

``datasets`` puts files into splits by words anywhere in their paths, and names the classes of archives by the folder
that an archive is in. This module lists the files itself and treats an archive as a folder of its name, without
``.zip``.

In a table beside the images (``metadata.csv``, ``metadata.jsonl``, ``metadata.parquet``), a row names its image by a
path from the table's folder. The dataset's README.md decides the splits, else folders at the top that are named like
splits. A row without its image is an error; images without a row are counted in a note with an example.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import datasets
import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ham_hf.data.class_folders import (
    DATA_EXTENSIONS,
    METADATA_NAMES,
    common_folder,
    folder_of_split,
    is_hidden,
    is_image,
    list_files,
    note,
    note_unnamed_images,
    refuse_repeated,
    shown,
    sort_into_classes,
    split_name,
)
from ham_hf.data.declarations import listed, names_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The files of a dataset.

    Attributes:
        where: of each path, relative and with ``/``, the file or URL.
        download: from URLs to files, in order; None for files of this machine.
        split_of: splits of files as the dataset's README.md declares them; None if it does not.
        notes: images and files that are left out, each kind with its number and an example.
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


def files_below(root: str) -> ImageFiles:
    """Every file below a URL, or below a folder, also behind links."""
    if "://" in root:
        filesystem, start = fsspec.url_to_fs(root)
        paths = [path[len(start) :].lstrip("/") for path in filesystem.find(start, expand_info=False)]
        return ImageFiles(where={path: f"{root}/{path}" for path in paths})
    paths, notes = list_files(Path(root))
    return ImageFiles(where={path: str(Path(root).absolute() / path) for path in paths}, notes=tuple(notes))


def holds_images(files: ImageFiles) -> bool:
    """Whether local files are images, themselves or in zip archives, rather than other data."""
    images = sum(map(is_image, files.where))
    data = [path for path in files.where if path.lower().endswith(DATA_EXTENSIONS) and not is_hidden(path)]
    if images or not data or not all(path.lower().endswith(".zip") for path in data):
        return images > len(data)
    names: list[str] = []
    for path in data:
        with _explained(path), zipfile.ZipFile(files.where[path]) as opened:
            names += [name for name in opened.namelist() if not is_hidden(name)]
    return sum(map(is_image, names)) > sum(name.lower().endswith(DATA_EXTENSIONS) for name in names)


def files_of_builder(
    builder: datasets.DatasetBuilder, *, splits_declared: bool, only_configuration: bool
) -> ImageFiles:
    """Every file of the dataset that a builder of ``datasets``, opened and nothing prepared, would read.

    ``splits_declared``: README.md says which files the configuration has; ``only_configuration``: the remaining ones
    cannot be another configuration's.
    """
    root = "/".join(part for part in (str(builder.base_path).rstrip("/"), builder.config.data_dir) if part)
    files = files_below(root)
    if "://" in root:
        settings = datasets.DownloadConfig(token=builder.token)
        manager = datasets.DownloadManager(dataset_name=builder.dataset_name, download_config=settings)
        files = replace(files, download=manager.download)
    if not splits_declared:
        return files
    path_of = {file: path for path, file in files.where.items()}
    declared = builder.config.data_files.items()
    split_of = {path_of.get(str(file), str(file)): str(split) for split, found in declared for file in found}
    where = {**files.where, **{path: path for path in split_of if path not in files.where}}
    unread = [path for path in where if is_image(path) and path not in split_of and only_configuration]
    notes = note(unread, "image files are in no data_files of README.md and are not read")
    return replace(files, where=where, split_of=split_of, notes=(*files.notes, *notes))


def read_image_files(files: ImageFiles) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """Images with labels, by tables where there are any, else by class folders; and notes on files that are not read.

    Raises:
        ValueError: as `sort_into_classes` does, for an archive or a table that cannot be read, tables that do not fit
            together, a row whose image is missing or has two rows, and if there is no image.
    """
    files = _unpacked(files)
    usable = files.where if files.split_of is None else [path for path in files.where if path in files.split_of]
    tables = [path for path in usable if PurePosixPath(path).name in METADATA_NAMES and not is_hidden(path)]
    splits, notes = _read_tables(files, tables) if tables else _read_class_folders(files)
    if not splits:
        raise ValueError("it has no image that is not hidden")
    noted = (*files.notes, *notes)
    for sentence in noted:
        logger.warning("%s", sentence)
    return splits, noted


def _unpacked(files: ImageFiles) -> ImageFiles:
    """With the files of zip archives in their place, where there are more archives than images beside them."""
    archives = [path for path in files.where if path.lower().endswith(".zip") and not is_hidden(path)]
    if len(archives) <= sum(map(is_image, files.where if files.split_of is None else files.split_of)):
        return files
    where = {path: file for path, file in files.where.items() if path not in archives}
    split_of = None if files.split_of is None else dict(files.split_of)
    for archive, file in files.fetch(archives).items():
        root = _unpack(archive, file)
        unpacked = {f"{archive[: -len('.zip')]}/{path}": str(root / path) for path in list_files(root)[0]}
        where |= unpacked
        if split_of is not None and archive in split_of:
            split_of |= dict.fromkeys(unpacked, split_of[archive])
    return replace(files, where=where, split_of=split_of)


def _unpack(archive: str, file: str) -> Path:
    """The folder in the cache of ``datasets`` that holds the files of an archive; each version has its own."""
    status = os.stat(file)
    key = f"{os.path.realpath(file)}\n{status.st_size}\n{status.st_mtime_ns}"
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "ham_hf_archives"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _explained(archive), zipfile.ZipFile(file) as opened, tempfile.TemporaryDirectory(dir=cache) as part:
        refuse_repeated([f"{archive}/{name}" for name in opened.namelist()])
        opened.extractall(f"{part}/files")
        try:
            os.rename(f"{part}/files", folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


@contextmanager
def _explained(archive: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the archive {shown(archive)} cannot be unpacked ({error}): repair it") from error


def _read_class_folders(files: ImageFiles) -> tuple[datasets.DatasetDict, list[str]]:
    found, notes = sort_into_classes(files.where, files.split_of)
    names = sorted({name for images in found.values() for _, name in images})
    labels = datasets.ClassLabel(names=names)
    file_of = files.fetch([path for images in found.values() for path, _ in images])
    splits = datasets.DatasetDict()
    for split, images in found.items():
        table = pa.table({"label": labels.str2int([name for _, name in images])})
        splits[split] = _with_images(table, "image", [file_of[path] for path, _ in images], {"label": labels})
    if files.download is None and splits:
        notes += note_unnamed_images(files.where)
    return splits, notes


def _with_images(
    table: pa.Table, column: str, files: Sequence[str], features: Mapping[str, object]
) -> datasets.Dataset:
    """A table with a column of images in front, which stay in their files."""
    stored = [pa.nulls(len(files), pa.binary()), pa.array(files, pa.string())]
    whole = table.add_column(0, column, pa.StructArray.from_arrays(stored, names=["bytes", "path"]))
    schema = datasets.Features({column: datasets.Image(), **features}).arrow_schema
    return datasets.Dataset(datasets.table.InMemoryTable(whole.cast(schema)))


NAME = "file_name"


def _read_tables(files: ImageFiles, tables: Sequence[str]) -> tuple[datasets.DatasetDict, list[str]]:
    """Every image that a row of ``tables`` names, with the other columns of its table; images stay in their files."""
    split_of = files.split_of
    contents = _typed({table: _read(table, file) for table, file in files.fetch(sorted(tables)).items()})
    column = _image_column(contents)
    table = _joined(contents)
    images = [path for name, content in contents.items() for path in _images_of(name, content[column].to_pylist())]
    refuse_repeated(images)
    missing = sorted(set(images) - files.where.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} rows of {' and '.join(map(shown, contents))} name images that are not there, such as "
            f"{shown(missing[0])}: a name is a path from the table's folder, and an archive is a folder of its name"
        )
    others = set(files.where if split_of is None else split_of) - set(images)
    unlisted = sorted(filter(is_image, others))
    notes = note(unlisted, f"image files have no row in {' or '.join(map(shown, contents))} and are not read")
    splits = _splits_by_folder(images, list(contents)) if split_of is None else [split_of.get(path) for path in images]
    apart = [path for path, split in zip(images, splits, strict=True) if split is None]
    if apart and split_of is None:
        raise ValueError(
            f"{len(apart)} images with a row lie outside of the split folders, such as {shown(apart[0])}: move them "
            "into one, or rename the folders that are named like splits"
        )
    features = datasets.Features.from_arrow_schema(table.schema)
    del features[column]
    image = "image" if column == NAME else column.removesuffix(f"_{NAME}")
    if image in features:
        raise ValueError(f"{' and '.join(map(shown, contents))}: the images are called {image!r}, rename that column")
    found = datasets.DatasetDict()
    for split in dict.fromkeys(split for split in splits if split is not None):
        rows = [row for row, own in enumerate(splits) if own == split]
        fetched = files.fetch([images[row] for row in rows])
        own = [fetched[images[row]] for row in rows]
        found[split] = _with_images(table.take(rows).drop_columns([column]), image, own, features)
    return found, notes


def _read(table: str, file: str) -> tuple[pa.Table, pa.Table]:
    """A table with the types that pyarrow finds, and with those that its file declares: text, for each cell of CSV."""
    kind = PurePosixPath(table).suffix
    try:
        if kind == ".csv":
            # A class may be called NA or null: only an empty cell is none.
            cells = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
            lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            content = pyarrow.csv.read_csv(file, convert_options=cells, parse_options=lines)
            cells.column_types = dict.fromkeys(content.column_names, pa.string())
            return content, pyarrow.csv.read_csv(file, convert_options=cells, parse_options=lines)
        content = pyarrow.json.read_json(file) if kind == ".jsonl" else pq.read_table(file)
        return content, content
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the table {shown(table)} cannot be read: {error}") from error


def _typed(contents: Mapping[str, tuple[pa.Table, pa.Table]]) -> dict[str, pa.Table]:
    """Each table of `_read`, a column in one way in all of them: typed, or as it is written."""
    columns: dict[str, list[tuple[pa.ChunkedArray, pa.ChunkedArray]]] = {}
    for both in contents.values():
        for name, found, written in zip(both[0].column_names, *both, strict=True):
            columns.setdefault(name, []).append((found, written))
    as_text, typed = {name for name, tables in columns.items() if _is_text(tables)}, {}
    for table, (content, written) in contents.items():
        typed[table] = content
        for place in (place for place, name in enumerate(content.column_names) if name in as_text):
            typed[table] = typed[table].set_column(place, written.field(place), written[place])
    return typed


def _is_text(tables: Sequence[tuple[pa.ChunkedArray, pa.ChunkedArray]]) -> bool:
    """Whether cells stay as they are written: dates, and where types differ, 007 would become 7, or true True."""
    filled = [(found, pc.utf8_trim_whitespace(written)) for found, written in tables if written.type == pa.string()]
    kinds = {found.type for found, _ in tables if found.null_count < len(found)}
    if len(kinds) != 1 or not filled:
        return len(kinds) > 1
    kind = kinds.pop()
    if pa.types.is_boolean(kind):
        values, spelled = ({cell for one in filled for cell in one[side].unique().to_pylist()} for side in (0, 1))
        return len(spelled) == len(values)
    differ = any(not found.cast(pa.string()).equals(cells) for found, cells in filled)
    return pa.types.is_temporal(kind) or (pa.types.is_integer(kind) and differ)


def _image_column(contents: Mapping[str, pa.Table]) -> str:
    """The column of file names: ``file_name``, else the only one whose name ends so."""
    found: set[str] = set()
    for table, content in contents.items():
        named = [name for name in content.column_names if name == NAME or name.endswith(f"_{NAME}")]
        if NAME not in named and len(named) != 1:
            raise ValueError(
                f"the table {shown(table)} has no column {NAME!r} that says which image a row is of, only "
                f"{', '.join(map(repr, content.column_names))}: rename the column, or the table if it is about "
                "something else"
            )
        found.add(NAME if NAME in named else named[0])
    if len(found) > 1:
        raise ValueError(f"tables call the column of file names {' and '.join(map(repr, sorted(found)))}: choose one")
    return found.pop()


def _joined(contents: Mapping[str, pa.Table]) -> pa.Table:
    first, *others = contents
    declared = {table: names_in(datasets.Features.from_arrow_schema(contents[table].schema)) for table in contents}
    for table in others:
        for column, names in declared[first].items():
            if declared[table].get(column) != names:
                raise ValueError(
                    f"column {column!r}: {shown(first)} declares the classes {listed(names)} and {shown(table)} "
                    f"{listed(declared[table].get(column, ()))}: declare the same names in the same order"
                )
    try:
        return pa.concat_tables(contents.values(), promote_options="default")
    except pa.ArrowException as error:
        raise ValueError(
            f"the tables {' and '.join(map(shown, contents))} have columns of different types: {error}"
        ) from error


def _images_of(table: str, names: Sequence[object]) -> list[str]:
    found = []
    for row, name in enumerate(names):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table), name)) if isinstance(name, str) else ".."
        if path == ".." or path.startswith(("../", "/")):
            raise ValueError(f"{shown(table)}, row {row}: {name!r} is not a path to an image of this dataset")
        found.append(path)
    return found


def _splits_by_folder(images: Sequence[str], tables: Sequence[str]) -> list[str | None]:
    """Split of each image: by the folder at the top, where any is named like a split; else train."""
    start = len(common_folder([*images, *tables], 2))
    parts = [PurePosixPath(path).parts[start:] for path in images]
    tops = [of_path[0] if len(of_path) > 1 else "" for of_path in parts]
    split_of = {top: split for split, top in folder_of_split(sorted({top for top in tops if split_name(top)})).items()}
    return [split_of.get(top) for top in tops] if split_of else ["train"] * len(images)
