"""Images whose labels are in tables beside them: ``metadata.csv``, ``metadata.jsonl``, ``metadata.parquet``.

A row names its image by a path from the table's folder. Only a folder at the top that is named like a split is a
split, or what the dataset's README.md says; no word in the name of a file or of a deeper folder decides anything.
Every row is read or refused, and images without a row are counted in a note with an example.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ham_hf.data.class_folders import (
    common_folder,
    folder_of_split,
    is_hidden,
    is_image_name,
    note,
    refuse_repeated,
    shown,
    split_name,
)
from ham_hf.data.declarations import listed, names_in

NAME = "file_name"
Fetch = Callable[[Sequence[str]], Mapping[str, str]]
"""From paths in a dataset to files on this machine."""


def read_image_tables(
    paths: Sequence[str], tables: Sequence[str], split_of: Mapping[str, str] | None, fetch: Fetch
) -> tuple[datasets.DatasetDict, list[str]]:
    """Every image that a row names, with the other columns of its table; images stay in their files.

    Args:
        paths: relative paths of all files, with ``/``.
        tables: those of them that are tables.
        split_of: splits of files as README.md has them; None: folders at the top decide.
        fetch: see `Fetch`.

    Raises:
        ValueError: for a table that cannot be read or has no column of file names, tables with columns of different
            types or classes, a row whose image is not there, an image with two rows, and rows for images beside the
            split folders.
    """
    contents = {table: _read(table, file) for table, file in fetch(sorted(tables)).items()}
    column = _image_column(contents)
    table = _joined(contents)
    images = [path for name, content in contents.items() for path in _images_of(name, content[column].to_pylist())]
    refuse_repeated(images)
    missing = sorted(set(images) - set(paths))
    if missing:
        raise ValueError(
            f"{len(missing)} rows of {' and '.join(map(shown, contents))} name images that are not there, such as "
            f"{shown(missing[0])}: a name is a path from the table's folder, and an archive is a folder of its name"
        )
    others = set(paths if split_of is None else split_of) - set(images)
    unlisted = sorted(path for path in others if is_image_name(path) and not is_hidden(path))
    notes = note(unlisted, f"image files have no row in {' or '.join(map(shown, contents))} and are not read")
    splits = _splits_by_folder(images, list(contents)) if split_of is None else [split_of.get(path) for path in images]
    apart = [path for path, split in zip(images, splits, strict=True) if split is None]
    if apart and split_of is None:
        raise ValueError(
            f"{len(apart)} images with a row lie outside of the split folders, such as {shown(apart[0])}: move them "
            "into one, or rename the folders that are named like splits"
        )
    features = datasets.Features.from_arrow_schema(table.schema)
    image = "image" if column == NAME else column.removesuffix(f"_{NAME}")
    features = datasets.Features({image: datasets.Image(), **{k: v for k, v in features.items() if k != column}})
    found = datasets.DatasetDict()
    for split in dict.fromkeys(split for split in splits if split is not None):
        rows = [row for row, own in enumerate(splits) if own == split]
        files = fetch([images[row] for row in rows])
        stored = pa.StructArray.from_arrays(
            [pa.nulls(len(rows), pa.binary()), pa.array([files[images[row]] for row in rows], pa.string())],
            names=["bytes", "path"],
        )
        others = table.take(rows).drop_columns([column])
        whole = others.add_column(0, image, stored).cast(features.arrow_schema)
        found[split] = datasets.Dataset(datasets.table.InMemoryTable(whole))
    return found, notes


def _read(table: str, file: str) -> pa.Table:
    kind = PurePosixPath(table).suffix
    try:
        if kind == ".csv":
            # A class may be called NA or null: only an empty cell is none.
            cells = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
            lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            return pyarrow.csv.read_csv(file, convert_options=cells, parse_options=lines)
        return pyarrow.json.read_json(file) if kind == ".jsonl" else pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the table {shown(table)} cannot be read: {error}") from error


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
    """Path of the image of each row."""
    found = []
    for row, name in enumerate(names):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table), name)) if isinstance(name, str) else ".."
        if path == ".." or path.startswith(("../", "/")):
            raise ValueError(f"{shown(table)}, row {row}: {name!r} is no path to an image of this dataset")
        found.append(path)
    return found


def _splits_by_folder(images: Sequence[str], tables: Sequence[str]) -> list[str | None]:
    """Split of each image: by the folder at the top, where any is named like a split; else train."""
    start = len(common_folder([*images, *tables], 2))
    parts = [PurePosixPath(path).parts[start:] for path in images]
    tops = [of_path[0] if len(of_path) > 1 else "" for of_path in parts]
    split_of = {top: split for split, top in folder_of_split(sorted({top for top in tops if split_name(top)})).items()}
    return [split_of.get(top) for top in tops] if split_of else ["train"] * len(images)
