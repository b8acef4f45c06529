"""The files of a split that is read as a stream: how many examples each has, and reading them in order.

A streamed split stays where it is, in parquet files or WebDataset archives. Only small things are kept in the cache of
``datasets``: the number of examples of each file, and splits or held-out parts that are read as a whole.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

from ham_hf.data.declarations import StreamError

__all__ = ["Example", "Shards", "SplitFiles", "StreamError", "count_rows", "held_out_rows", "read_whole"]

INFO_NAMES = ("_info.json", "info.json")  # beside the archives, as timm and webdataset write it
OPEN_AT_ONCE = 16
MAX_LIST_BYTES = 64 * 2**20
MAX_ARCHIVE_LENGTH = 10**9


class Example(NamedTuple):
    """One example of a stream.

    Attributes:
        number: of the example in the split, counted over the files in their order.
        encoded: image as ``{"bytes": ..., "path": ...}``, not decoded.
        label: its class.
    """

    number: int
    encoded: Mapping[str, Any] | None
    label: int


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """A split of a dataset in parquet files or WebDataset archives.

    Attributes:
        split: its name, for messages.
        files: paths or URLs, in order.
        version: tells one version of the files from another.
        stream: the split as ``datasets`` streams it; its shards are the files.
        label_column: column whose labels count ``file_names``; None if no file declares class names.
        class_names: names that the labels count when they are given out.
        file_names: of each file the names that its labels count.
    """

    split: str
    files: tuple[str, ...]
    version: str
    stream: datasets.IterableDataset
    label_column: str | None = None
    class_names: tuple[str, ...] = ()
    file_names: tuple[tuple[str, ...], ...] = ()

    @property
    def are_parquet(self) -> bool:
        """Whether the files are parquet files, not archives."""
        return _are_parquet(self.files)

    def rows(self, columns: Sequence[str], file: int, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
        """Rows ``start`` to ``stop`` (None: the end) of a file, images not decoded.

        Of a parquet file the row groups are read in which these rows are; an archive is read from its beginning.

        Labels are matched by name where the file declares its classes (`class_of`).

        Raises:
            StreamError: if a row of files from elsewhere names a file of this machine instead of holding an image.
        """
        rows = self._own(self._rows(columns, file, start, stop), file, start)
        label = self.label_column
        if label is None or label not in columns or self.file_names[file] == self.class_names:
            return rows
        return ({**values, label: self.class_of(values[label], file, row)} for row, values in enumerate(rows, start))

    def class_of(self, label: object, file: int, row: int) -> object:
        """The class of a label of a file, matched by name; what is no label of the file stays as it is.

        Raises:
            StreamError: if the file's name for it is none of the classes, or the file has no name for it.
        """
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
        if self.are_parquet:
            return _parquet_rows(self.files[file], columns, start, stop)
        images = [name for name in columns if isinstance(self.stream.features[name], datasets.Image)]
        chosen = self.stream.select_columns(list(columns)).shard(len(self.files), file)
        for name in images:
            chosen = chosen.cast_column(name, datasets.Image(decode=False))
        return islice(iter(chosen), start, stop)

    def _own(self, rows: Iterator[dict[str, Any]], file: int, start: int) -> Iterator[dict[str, Any]]:
        """The rows, which have to hold their images themselves unless the files are of this machine as well."""
        for row, values in enumerate(rows, start):
            for name, value in values.items() if "://" in self.files[file] else ():
                path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
                # What the column is declared as does not say what the file holds.
                if isinstance(value, str) and _may_be_image(self.stream.features[name]):
                    path = value
                if path is not None:
                    raise StreamError(
                        f"split {self.split!r}, {self.files[file]}, row {row} holds no image, it names the file "
                        f"{path!r} of this machine, which a dataset of the Hub may not; choose another one"
                    )
            yield values


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of the training split, and what of them is for training.

    Attributes:
        source: the files.
        image_column: name of the image column.
        label_column: name of the label column.
        num_rows: examples of each file.
        num_held_out: how many of them, the first ones, are not for training.
        num_classes: classes that the labels tell apart.
    """

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
        """Examples ``start`` to ``stop`` of a file.

        Raises:
            StreamError: if the file cannot be read, is shorter than was counted, or has a label that is no class.
        """
        row, columns = start, (self.image_column, self.label_column)
        try:
            for values in self.source.rows(columns, file, start, stop):
                label = values[self.label_column]
                self._check_label(label, file, row)
                yield Example(self.offsets[file] + row, _encoded(values[self.image_column]), label)
                row += 1
        except StreamError:
            raise
        except Exception as error:
            # Network, Hub, file format: dozens of exception types.
            raise StreamError(
                f"{self._where(file, row)}: reading the stream failed "
                f"({type(error).__name__}: {error}); go on with --resume_from_checkpoint latest"
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
        """(num_classes,) int64, training examples of each class; None if all images would have to be read for it.

        Reads the label column of all parquet files, and nothing else of them.
        """
        if not self.source.are_parquet:
            return None

        def labels(number: int) -> Tensor:
            name = self.source.files[number]
            with _naming(name), fsspec.open(name, "rb") as file:
                column = pq.read_table(file, columns=[self.label_column])[self.label_column]
            values = column.to_pylist()[self.num_held_out[number] :]
            values = [
                self.source.class_of(label, number, row) for row, label in enumerate(values, self.num_held_out[number])
            ]
            for row, label in enumerate(values, self.num_held_out[number]):
                self._check_label(label, number, row)
            return torch.tensor(values, dtype=torch.long)

        with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
            found = torch.cat(list(pool.map(labels, range(len(self.source.files)))))
        return torch.bincount(found, minlength=self.num_classes)


def count_rows(source: SplitFiles, num_examples: int | None) -> tuple[int, ...]:
    """Number of examples of each training file: parquet files say it; of archives it is looked up or counted.

    For archives it comes from an ``_info.json`` beside them (``splits``, ``filenames``, ``shard_lengths``) if there is
    one, else local ones are counted by their headers; else all are taken to have the same share of ``num_examples``,
    rounded down.

    Args:
        source: the training split.
        num_examples: of all its files, as the user gave it.

    Raises:
        ValueError: if the numbers are not to be had, or ``num_examples`` is another.
    """
    files = source.files
    if source.are_parquet:
        rows = _on_threads(_parquet_length, source)
    else:
        listed = _listed_rows(files)
        if listed is None and not any("://" in file for file in files):
            listed = _on_threads(_archive_length, source)
        if listed is None:
            if num_examples is None:
                raise ValueError(
                    "--dataset_streaming needs the number of training examples, and neither the archives nor an "
                    f"{INFO_NAMES[0]} beside them (splits, filenames, shard_lengths) say it: give "
                    "--num_train_examples; archives are then taken to be equally long"
                )
            if num_examples < len(files):
                raise ValueError(f"--num_train_examples {num_examples}: there are {len(files)} archives")
            return (num_examples // len(files),) * len(files)
        rows = listed
    if num_examples is not None and num_examples != sum(rows):
        raise ValueError(f"--num_train_examples {num_examples}: the files have {sum(rows)} examples; leave it out")
    return rows


def held_out_rows(num_rows: Sequence[int], fraction: float) -> tuple[int, ...]:
    """How many examples, the first ones, of each file are held out: its share of ``fraction`` of all, rounded.

    At least one example of a file stays in train.
    """
    ends = [round(fraction * end) for end in accumulate(num_rows, initial=0)]
    return tuple(
        min(end - start, rows - 1) if rows else 0 for (start, end), rows in zip(pairwise(ends), num_rows, strict=True)
    )


def read_whole(
    source: SplitFiles, features: datasets.Features, first_rows: Mapping[int, int] | None = None
) -> datasets.Dataset:
    """A split, or the first rows of some of its files, read once into the cache of ``datasets``.

    Args:
        source: the split.
        features: of the columns to keep.
        first_rows: how many of which files; None = everything.
    """
    wanted = dict.fromkeys(range(len(source.files))) if first_rows is None else first_rows

    def rows() -> Iterator[dict[str, Any]]:
        for file, count in wanted.items():
            with _naming(source.files[file]):
                yield from source.rows(list(features), file, 0, count)

    key = ["rows", *source.files, source.version, str(features), str(first_rows)]
    if any(names != source.class_names for names in source.file_names):
        key.append(str(source.file_names))
    return _cached(key, features, rows)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Say which file it is that cannot be read, before training."""
    try:
        yield
    except StreamError:
        raise
    except Exception as error:
        # Network, Hub, file format: dozens of exception types.
        raise StreamError(
            f"{file} cannot be read ({type(error).__name__}: {error}); if it is whole, the same command tries again"
        ) from error


def _may_be_image(feature: object) -> bool:
    """Whether values of a column end up as images: all but those of labels do."""
    label = isinstance(feature, datasets.Value) and feature.dtype not in ("binary", "large_binary")
    return not label and not isinstance(feature, datasets.ClassLabel)


def _are_parquet(files: Sequence[str]) -> bool:
    return all(file.endswith(".parquet") for file in files)


def _on_threads(length_of: Callable[[str], int], source: SplitFiles) -> tuple[int, ...]:
    def named_length(file: str) -> int:
        with _naming(file):
            return length_of(file)

    def lengths() -> Iterator[dict[str, int]]:
        with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
            for number in pool.map(named_length, source.files):
                yield {"rows": number}

    key = ["lengths", *source.files, source.version]
    return tuple(_cached(key, datasets.Features({"rows": datasets.Value("int64")}), lengths)["rows"][:])


def _cached(
    key: Sequence[str], features: datasets.Features, rows: Callable[[], Iterator[dict[str, Any]]]
) -> datasets.Dataset:
    """What ``rows`` yields, on disk in the cache of ``datasets``; made once for a key."""
    fingerprint = hashlib.sha256("\n".join(["ham_hf", *key]).encode()).hexdigest()[:32]
    try:
        return datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, StreamError):
            raise error.__cause__ from None
        raise


def _parquet_length(file: str) -> int:
    with fsspec.open(file, "rb") as opened:
        return int(pq.read_metadata(opened).num_rows)


def _parquet_rows(file: str, columns: Sequence[str], start: int, stop: int | None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, one row group in memory at a time.

    Not by ``datasets``: its scanner keeps the whole file in memory, starts at the first row, and has threads that
    bring the process down if it ends in the middle of a file.
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


def _encoded(image: Mapping[str, Any] | bytes | None) -> Mapping[str, Any] | None:
    """An encoded image as ``{"bytes": ..., "path": ...}``; columns of plain bytes are images too."""
    return {"bytes": image, "path": None} if isinstance(image, bytes) else image


def _archive_length(file: str) -> int:
    """Examples of a local archive: runs of files whose names are alike up to the first dot, as in WebDataset."""
    with tarfile.open(file, "r:*") as archive:
        names = [PurePosixPath(member.name) for member in archive if member.isfile()]
    keys = [name.parent / name.name.partition(".")[0] for name in names if not name.name.startswith((".", "__"))]
    return sum(key != before for key, before in zip(keys, [None, *keys], strict=False))


def _listed_rows(files: Sequence[str]) -> tuple[int, ...] | None:
    """Examples of each archive as a list beside them says; None if there is none or it does not know them all."""
    folder = files[0].rpartition("/")[0]
    for name in INFO_NAMES:
        try:
            with fsspec.open(f"{folder}/{name}", "rb") as opened:
                text = opened.read(MAX_LIST_BYTES + 1)
            if len(text) > MAX_LIST_BYTES:
                raise ValueError(f"it has more than {MAX_LIST_BYTES} bytes")
            splits = json.loads(text)["splits"].values()
            listed = [(file, rows) for split in splits for file, rows in zip(*_lists(split), strict=True)]
            of_name = {PurePosixPath(file).name: _checked_length(rows) for file, rows in listed}
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
        raise ValueError(f"{str(rows)[:40]} is no number of examples of an archive")
    return rows


def _lists(split: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    return split["filenames"], split["shard_lengths"]
