"""Read the class names that each parquet or Arrow file declares.

``datasets`` applies the declaration of the first file, or of the dataset's README.md, to all files. Labels are
numbers, so those of a file with a different order or fewer names would change their meaning. This module reads every
file's declaration; labels are then matched by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

OPEN_AT_ONCE = 16
README = "README.md"


class RepeatedNameError(ValueError):
    """Two classes have one name; the message gives it."""


class StreamError(ValueError):
    """A file cannot be read, or the stream broke during the run; the message names file and row."""


@dataclass(frozen=True, kw_only=True)
class FileClasses:
    """Path or URL of a file, its number of rows, and its class names in label order, of each column."""

    file: str
    num_rows: int
    names: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Declarations:
    """The class names that a dataset declares.

    Attributes:
        readme: names that README.md declares for the whole dataset, of each column.
        files: of each split its parquet or Arrow files, in order; nothing for other layouts.
    """

    readme: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: Mapping[str, tuple[FileClasses, ...]] = field(default_factory=dict)

    def class_names(self, column: str, train_split: str) -> tuple[str, ...] | None:
        """The classes of a column in label order: README.md's, else of the training file with the most; None without.

        ValueError if a training file declares a name that is not in it; both lists are named.
        """
        files = self.files.get(train_split, ())
        declared = [(file.file, file.names[column]) for file in files if column in file.names]
        if not declared and column not in self.readme:
            return None
        widest = max(declared, key=lambda found: len(found[1]), default=None)
        where, names = (README, self.readme[column]) if widest is None or column in self.readme else widest
        for file, others in declared:
            new = [name for name in others if name not in names]
            if new:
                raise ValueError(
                    f"column {column!r}: {where} declares the {len(names)} classes {listed(names)}, and {file} the "
                    f"{len(others)} classes {listed(others)}: {listed(new)} of the second are none of the first; "
                    "declare the same names in both, or choose another --label_column"
                )
        return names

    def row_names(self, column: str, split: str, train_split: str) -> list[tuple[FileClasses, tuple[str, ...]]]:
        """Files of a split with the names that their labels index; empty if nothing is declared.

        Labels of a file without names index those of the whole dataset, with a warning unless README.md has them.
        ValueError as of `class_names`, or if the files disagree on the names of a file without any.
        """
        common = self.class_names(column, train_split)
        files = self.files.get(split, ())
        if common is None:
            return []
        silent = [file.file for file in files if column not in file.names]
        if silent and column not in self.readme:
            known = [file for others in self.files.values() for file in others if column in file.names]
            second = next((file for file in known if file.names[column] != known[0].names[column]), None)
            if second is not None:
                raise ValueError(
                    f"column {column!r}: {silent[0]} declares no class names, and {known[0].file} and {second.file} "
                    f"declare different ones, {listed(known[0].names[column])} and {listed(second.names[column])}, "
                    "so the meaning of its labels is unknown; declare the names in every file, or in README.md"
                )
            logger.warning(
                "%d of %d files of split %r declare no class names in column %r, such as %s: their labels are "
                "read with the names that other files declare",
                len(silent),
                len(files),
                split,
                column,
                silent[0],
            )
        return [(file, file.names.get(column, common)) for file in files]

    def widest(self) -> dict[str, datasets.ClassLabel]:
        """Of each column that is declared in several ways, the declaration with the most names."""
        ways: dict[str, list[tuple[str, ...]]] = {}
        for declared in (self.readme, *(file.names for files in self.files.values() for file in files)):
            for column, names in declared.items():
                ways.setdefault(column, []).append(names)
        return {
            column: datasets.ClassLabel(names=list(max(found, key=lambda names: len(tuple(names)))))
            for column, found in ways.items()
            if len(set(found)) > 1
        }


def names_in(features: datasets.Features | None) -> dict[str, tuple[str, ...]]:
    """Class names of each ``ClassLabel`` column, in label order."""
    return {
        column: tuple(map(str, feature.names))  # YAML reads a bare 0 as a number
        for column, feature in (features or {}).items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


def read_file_classes(files: Sequence[str], version: str) -> tuple[FileClasses, ...]:
    """The declarations of each file; those of remote files are cached by ``datasets``, per version."""

    def found() -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
            yield from pool.map(_declared, files)

    rows: Iterable[dict[str, Any]] = found()
    if any("://" in file for file in files):
        features = datasets.Features({"rows": datasets.Value("int64"), "names": datasets.Value("string")})
        rows = cached(["class names", *files, version], features, found)
    names = [(row["rows"], json.loads(row["names"]).items()) for row in rows]
    return tuple(
        FileClasses(file=file, num_rows=num_rows, names={column: tuple(classes) for column, classes in declared})
        for file, (num_rows, declared) in zip(files, names, strict=True)
    )


def _declared(file: str) -> dict[str, Any]:
    with naming(file):
        schema, num_rows = read_schema(file)
        _refuse_repeated_names(file, schema)
        return {"rows": num_rows, "names": json.dumps(names_in(datasets.Features.from_arrow_schema(schema)))}


def read_schema(file: str) -> tuple[pa.Schema, int]:
    """The schema and the number of rows of a parquet or Arrow file; all of an Arrow file is read for it."""
    with fsspec.open(file, "rb") as opened:
        if not file.lower().endswith(".arrow"):
            with pq.ParquetFile(opened, pre_buffer=False) as parquet:
                return parquet.schema_arrow, parquet.metadata.num_rows
        magic = opened.read(6)
        opened.seek(0)
        if magic == b"ARROW1":
            stored = pa.ipc.open_file(opened)
            return stored.schema, sum(stored.get_batch(place).num_rows for place in range(stored.num_record_batches))
        stream = pa.ipc.open_stream(opened)
        return stream.schema, sum(batch.num_rows for batch in stream)


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Turn any error into a `StreamError` that names the file which cannot be read."""
    try:
        yield
    except (RepeatedNameError, StreamError):
        raise
    except Exception as error:
        # Network, Hub, file format: dozens of exception types.
        raise StreamError(
            f"{file} cannot be read ({type(error).__name__}: {error}); if it is whole, the same command tries again"
        ) from error


def cached(
    key: Sequence[str], features: datasets.Features, rows: Callable[[], Iterator[dict[str, Any]]]
) -> datasets.Dataset:
    """The rows that ``rows`` yields, on disk in the cache of ``datasets``; made once for a key."""
    fingerprint = hashlib.sha256("\n".join(["ham_hf", *key]).encode()).hexdigest()[:32]
    try:
        return datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, StreamError):
            raise error.__cause__ from None
        raise


def _refuse_repeated_names(file: str, schema: pa.Schema) -> None:
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for column, feature in stored.get("info", {}).get("features", {}).items():
        names = feature.get("names") if isinstance(feature, dict) else None
        counts = Counter(names) if isinstance(names, list) else Counter()
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise RepeatedNameError(
                f"column {column!r}: {file} declares {counts[twice[0]]} classes called {twice[0]!r}: give each "
                "a unique name"
            )


def listed(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(map(repr, names[:12]))
    return f"[{shown}{', ...' if len(names) > 12 else ''}]"
