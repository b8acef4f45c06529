"""Read the files of a streamed split in order, and count their examples.

A streamed split stays in its parquet files or WebDataset archives. The cache of ``datasets`` keeps the number of
examples of each file, and splits or held-out parts that are read as a whole.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ham_hf.data.declarations import OPEN_AT_ONCE, StreamError, cached, naming

INFO_NAMES = ("_info.json", "info.json")  # beside the archives, as timm and webdataset write it
MAX_LIST_BYTES = 64 * 2**20
MAX_ARCHIVE_LENGTH = 10**9


class Example(NamedTuple):
    """An example: its number in the split, image as ``{"bytes": ..., "path": ...}``, class, and place for messages."""

    number: int
    encoded: Mapping[str, Any] | None
    label: int
    where: str


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """A split of a dataset in parquet files or WebDataset archives.

    Attributes:
        split: its name, for messages.
        files: paths or URLs, in order.
        version: tells one version of the files from another.
        stream: the split as ``datasets`` streams it; its shards are the files.
        num_rows: examples of each parquet file; None for archives.
        label_column: column whose labels index ``file_names`` or are names; None if no file declares class names.
        class_names: names that the labels index when they are given out.
        file_names: of each file the names that its labels index.
    """

    split: str
    files: tuple[str, ...]
    version: str
    stream: datasets.IterableDataset
    num_rows: tuple[int, ...] | None = None
    label_column: str | None = None
    class_names: tuple[str, ...] = ()
    file_names: tuple[tuple[str, ...], ...] = ()

    @property
    def features(self) -> datasets.Features:
        """Kinds of the columns."""
        return self.stream.features

    def rows(self, columns: Sequence[str], file: int, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
        """Rows ``start`` to ``stop`` (None: the end) of a file, images not decoded, labels as `class_of` gives them.

        Reads the row groups of a parquet file that hold these rows, and an archive from its beginning. StreamError if
        a row of files from elsewhere names a file of this machine instead of holding an image.
        """
        label = self.label_column if self.label_column in columns else None
        for row, values in enumerate(self._rows(columns, file, start, stop), start):
            if "://" in self.files[file]:
                self._check_own(values, file, row)
            yield values if label is None else {**values, label: self.class_of(values[label], file, row)}

    def class_of(self, label: object, file: int, row: int) -> object:
        """The class of a label of a file, matched by name, or StreamError; missing and negative labels stay."""
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        if self.label_column is None or self.file_names[file] == self.class_names:
            return label
        if not isinstance(label, int) or label < 0:
            return label
        names = self.file_names[file]
        if label < len(names) and names[label] in self.class_names:
            return self.class_names.index(names[label])
        what = repr(names[label]) if label < len(names) else f"number {label} of {len(names)}"
        raise StreamError(
            f"split {self.split!r}, {self.files[file]}, row {row}: the label is {what}, of {list(names)[:12]} that "
            f"the file declares, and the classes are {list(self.class_names)[:12]}; declare the same names in every "
            "file, or choose another --label_column"
        )

    def _rows(self, columns: Sequence[str], file: int, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
        if self.num_rows is not None:
            return _parquet_rows(self.files[file], columns, start, stop)
        images = [name for name in columns if isinstance(self.features[name], datasets.Image)]
        chosen = self.stream.select_columns(list(columns)).shard(len(self.files), file)
        for name in images:
            chosen = chosen.cast_column(name, datasets.Image(decode=False))
        return islice(iter(chosen), start, stop)

    def _check_own(self, values: Mapping[str, Any], file: int, row: int) -> None:
        for name, value in values.items():
            path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
            # The declared type of the column does not tell the content of the file.
            kind = self.features[name]
            labels = isinstance(kind, datasets.Value | datasets.ClassLabel) and "binary" not in kind.dtype
            if isinstance(value, str) and not labels:
                path = value
            if path is not None:
                raise StreamError(
                    f"split {self.split!r}, {self.files[file]}, row {row} holds no image, it names the file {path!r} "
                    "of this machine, which a dataset of the Hub may not; choose another one"
                )


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of the training split; the first ``num_held_out`` of each file's ``num_rows`` are not for training."""

    source: SplitFiles
    image_column: str
    label_column: str
    num_rows: tuple[int, ...]
    num_held_out: tuple[int, ...]
    num_classes: int

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Number of the first example of each file."""
        return (0, *accumulate(self.num_rows))[:-1]

    def read(self, file: int, start: int, stop: int) -> Generator[Example, None, None]:
        """Examples ``start`` to ``stop``; StreamError for damaged files, missing rows and unknown labels."""
        row, columns = start, (self.image_column, self.label_column)
        try:
            for values in self.source.rows(columns, file, start, stop):
                label = values[self.label_column]
                self._check_label(label, file, row)
                image = values[self.image_column]
                if isinstance(image, bytes):  # columns of plain bytes are images too
                    image = {"bytes": image, "path": None}
                yield Example(self.offsets[file] + row, image, label, self._where(file, row))
                row += 1
        except StreamError:
            raise
        except Exception as error:
            # Network, Hub, file format: dozens of exception types.
            raise StreamError(
                f"{self._where(file, row)}: reading the stream failed "
                f"({type(error).__name__}: {error}); continue with --resume_from_checkpoint latest"
            ) from error
        if row < stop:
            raise StreamError(
                f"{self._where(file, row)}: the file ends here, and {self.num_rows[file]} examples of it were counted "
                "or follow from --num_train_examples; give the right number, or start again if the file has changed"
            )

    def _check_label(self, label: object, file: int, row: int) -> None:
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise StreamError(
                f"{self._where(file, row)}: label {label!r}, and the dataset declares {self.num_classes} "
                f"classes (0 to {self.num_classes - 1}); repair it or choose another --label_column"
            )

    def _where(self, file: int, row: int) -> str:
        return f"split {self.source.split!r}, {self.source.files[file]}, row {row}"

    def class_counts(self) -> Tensor | None:
        """(num_classes,) int64, training examples of each class, by the label column of all parquet files.

        None for archives, of which all images would have to be read.
        """
        if self.source.num_rows is None:
            return None

        def labels(number: int) -> Tensor:
            name = self.source.files[number]
            with naming(name), fsspec.open(name, "rb") as file:
                column = pq.read_table(file, columns=[self.label_column])[self.label_column]
            first = self.num_held_out[number]
            stored = enumerate(column.to_pylist()[first:], first)
            values = [self.source.class_of(label, number, row) for row, label in stored]
            for row, label in enumerate(values, first):
                self._check_label(label, number, row)
            return torch.tensor(values, dtype=torch.long)

        with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
            found = torch.cat(list(pool.map(labels, range(len(self.source.files)))))
        return torch.bincount(found, minlength=self.num_classes)


def count_rows(source: SplitFiles, num_examples: int | None) -> tuple[int, ...]:
    """Number of examples of each training file.

    Parquet files say it. Archives have an ``_info.json`` beside them (``splits``, ``filenames``, ``shard_lengths``),
    or are counted by their headers if they are local; else all have the same share of ``num_examples``, the user's
    number, rounded down. ValueError if none of these gives the numbers, or ``num_examples`` differs.
    """
    files = source.files
    rows = source.num_rows if source.num_rows is not None else _listed_rows(files)
    if rows is None and not any("://" in file for file in files):
        rows = _archive_lengths(source)
    if rows is None:
        if num_examples is None:
            raise ValueError(
                "--dataset_streaming needs the number of training examples, and neither the archives nor an "
                f"{INFO_NAMES[0]} beside them (splits, filenames, shard_lengths) say it: give "
                "--num_train_examples; archives are then assumed to be equally long"
            )
        if num_examples < len(files):
            raise ValueError(f"--num_train_examples {num_examples}: there are {len(files)} archives")
        return (num_examples // len(files),) * len(files)
    if num_examples is not None and num_examples != sum(rows):
        raise ValueError(f"--num_train_examples {num_examples}: the files have {sum(rows)} examples; leave it out")
    return rows


def held_out_rows(num_rows: Sequence[int], fraction: float) -> tuple[int, ...]:
    """Number of first examples of each file that are held out: its rounded share; one at least stays in train."""
    ends = [round(fraction * end) for end in accumulate(num_rows, initial=0)]
    return tuple(
        min(end - start, rows - 1) if rows else 0 for (start, end), rows in zip(pairwise(ends), num_rows, strict=True)
    )


def read_whole(
    source: SplitFiles, features: datasets.Features, first_rows: Mapping[int, int] | None = None
) -> datasets.Dataset:
    """Read the columns ``features`` of a split once into the cache of ``datasets``: ``first_rows`` by file, or all."""
    wanted = dict.fromkeys(range(len(source.files))) if first_rows is None else first_rows

    def rows() -> Iterator[dict[str, Any]]:
        for file, count in wanted.items():
            with naming(source.files[file]):
                yield from source.rows(list(features), file, 0, count)

    key = ["rows", *source.files, source.version, str(features), str(first_rows)]
    if any(names != source.class_names for names in source.file_names):
        key.append(str(source.file_names))
    return cached(key, features, rows)


def _archive_lengths(source: SplitFiles) -> tuple[int, ...]:
    def lengths() -> Iterator[dict[str, int]]:
        with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
            yield from ({"rows": number} for number in pool.map(_archive_length, source.files))

    key = ["lengths", *source.files, source.version]
    return tuple(cached(key, datasets.Features({"rows": datasets.Value("int64")}), lengths)["rows"][:])


def _parquet_rows(file: str, columns: Sequence[str], start: int, stop: int | None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, one row group in memory at a time.

    The scanner of ``datasets`` keeps the whole file in memory, starts at the first row, and has threads that crash
    the process if it ends in the middle of a file.
    """
    first = 0
    with fsspec.open(file, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
        for group in range(parquet.num_row_groups):
            end = first + parquet.metadata.row_group(group).num_rows
            if first >= (end if stop is None else stop):
                return
            if end > start:
                table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
                rows = range(max(start - first, 0), (end if stop is None else min(end, stop)) - first)
                for row in rows:
                    yield {name: table[name][row].as_py() for name in columns}
            first = end


def _archive_length(file: str) -> int:
    """Examples of a local archive: runs of files whose names are alike up to the first dot, as in WebDataset."""
    with naming(file), tarfile.open(file, "r:*") as archive:
        names = [PurePosixPath(member.name) for member in archive if member.isfile()]
    named = [name for name in names if "." in name.name and not name.name.startswith((".", "__"))]
    keys = [name.parent / name.name.partition(".")[0] for name in named]
    return sum(key != before for key, before in zip(keys, [None, *keys], strict=False))


def _listed_rows(files: Sequence[str]) -> tuple[int, ...] | None:
    """Examples of each archive, from a list beside them; None if there is no list or it lacks some of them."""
    folder = files[0].rpartition("/")[0]
    for name in INFO_NAMES:
        try:
            with fsspec.open(f"{folder}/{name}", "rb") as opened:
                text = opened.read(MAX_LIST_BYTES + 1)
            if len(text) > MAX_LIST_BYTES:
                raise ValueError(f"it has more than {MAX_LIST_BYTES} bytes")
            of_name = {
                PurePosixPath(file).name: _checked_length(rows)
                for split in json.loads(text)["splits"].values()
                for file, rows in zip(split["filenames"], split["shard_lengths"], strict=True)
            }
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder}/{name}: expected splits with filenames and shard_lengths of equal length ({error})"
            ) from error
        wanted = [PurePosixPath(file).name for file in files]
        if set(wanted) <= set(of_name):
            return tuple(of_name[file] for file in wanted)
    return None


def _checked_length(rows: object) -> int:
    """A number of examples that an archive can have."""
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 <= rows <= MAX_ARCHIVE_LENGTH:
        raise ValueError(f"{str(rows)[:40]} is not a number of examples")
    return rows
