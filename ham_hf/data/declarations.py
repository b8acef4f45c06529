"""The class names that parquet files declare, each for itself.

``datasets`` takes the declaration of the first file, or of the dataset's README.md, for all of them, and labels are
numbers: where another file counts the same names in another order, or counts fewer, its labels would change their
meaning. Here every file's declaration is read, and labels are matched by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """A file cannot be read, or the stream broke in mid-run; the message names file and row."""


@dataclass(frozen=True, kw_only=True)
class FileClasses:
    """What one parquet file declares.

    Attributes:
        file: its path or URL.
        num_rows: its rows.
        names: class names in label order, of each column that declares them.
    """

    file: str
    num_rows: int
    names: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Declarations:
    """What a dataset declares about its classes.

    Attributes:
        readme: names that README.md declares for the whole dataset, of each column.
        files: of each split its parquet files, in order; nothing for other layouts.
    """

    readme: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: Mapping[str, tuple[FileClasses, ...]] = field(default_factory=dict)

    def class_names(self, column: str, train_split: str) -> tuple[str, ...] | None:
        """The classes of a column: README.md's, else those of the training file that declares the most.

        Returns:
            The names in label order; None if neither declares any.

        Raises:
            ValueError: if a training file declares a name that is not among them; both lists are named.
        """
        declared = [
            (file.file, file.names[column]) for file in self.files.get(train_split, ()) if column in file.names
        ]
        if column in self.readme:
            declared.insert(0, (README, self.readme[column]))
            first = 0
        elif declared:
            first = max(range(len(declared)), key=lambda number: len(declared[number][1]))
        else:
            return None
        where, names = declared[first]
        for file, others in declared:
            if not set(others) <= set(names):
                raise ValueError(disagreement(column, where, names, file, others))
        return names

    def row_names(self, column: str, split: str, train_split: str) -> list[tuple[FileClasses, tuple[str, ...]]]:
        """Files of a split with the names that their labels count; empty if nothing is declared.

        A file that declares none is taken to count as the whole dataset does, which is warned of unless README.md
        says so.

        Raises:
            ValueError: as `class_names` does, or if others do not agree on what such a file may count.
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
                    "so it is not known what its labels count; declare the names in every file, or in README.md"
                )
            logger.warning(
                "%d of %d files of split %r declare no class names in column %r, such as %s: their labels are taken "
                "to count the names that other files declare",
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
            column: datasets.ClassLabel(names=list(found[max(range(len(found)), key=lambda way: len(found[way]))]))
            for column, found in ways.items()
            if len(set(found)) > 1
        }


def disagreement(column: str, first: str, names: Sequence[str], second: str, others: Sequence[str]) -> str:
    """Message about two declarations that cannot be matched by name."""
    new = [name for name in others if name not in set(names)]
    return (
        f"column {column!r}: {first} declares the {len(names)} classes {listed(names)}, and {second} the "
        f"{len(others)} classes {listed(others)}: {listed(new)} of the second are none of the first; declare the "
        "same names in both, or choose another --label_column"
    )


def names_in(features: datasets.Features | None) -> dict[str, tuple[str, ...]]:
    """Class names of each ``ClassLabel`` column, in label order."""
    return {
        column: tuple(map(str, feature.names))  # YAML reads a bare 0 as a number
        for column, feature in (features or {}).items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


def read_file_classes(files: Sequence[str], version: str) -> tuple[FileClasses, ...]:
    """What each parquet file declares; of files elsewhere it is kept in the cache of ``datasets``.

    Args:
        files: paths or URLs.
        version: tells one version of them from another.
    """

    def found() -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
            yield from pool.map(_declared, files)

    if not any("://" in file for file in files):
        return tuple(map(_file_classes, files, found()))
    features = datasets.Features({"rows": datasets.Value("int64"), "names": datasets.Value("string")})
    key = "\n".join(["ham_hf class names", *files, version])
    kept = datasets.Dataset.from_generator(
        found, features=features, fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32]
    )
    return tuple(map(_file_classes, files, kept))


def _file_classes(file: str, row: Mapping[str, Any]) -> FileClasses:
    names = {column: tuple(found) for column, found in json.loads(row["names"]).items()}
    return FileClasses(file=file, num_rows=row["rows"], names=names)


def _declared(file: str) -> dict[str, Any]:
    try:
        with fsspec.open(file, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
            _refuse_repeated_names(file, parquet.schema_arrow)
            names = names_in(datasets.Features.from_arrow_schema(parquet.schema_arrow))
            return {"rows": parquet.metadata.num_rows, "names": json.dumps(names)}
    except RepeatedNameError:
        raise
    except Exception as error:
        # Network, Hub, file format: dozens of exception types.
        raise StreamError(
            f"{file} cannot be read ({type(error).__name__}: {error}); if it is whole, the same command tries again"
        ) from error


def _refuse_repeated_names(file: str, schema: pa.Schema) -> None:
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for column, feature in stored.get("info", {}).get("features", {}).items():
        names = feature.get("names") if isinstance(feature, dict) else None
        counts = Counter(names) if isinstance(names, list) else Counter()
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise RepeatedNameError(
                f"column {column!r}: {file} declares {counts[twice[0]]} classes called {twice[0]!r}, which nothing "
                "could tell apart: give each a name of its own"
            )


def listed(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(map(repr, names[:12]))
    return f"[{shown}{', ...' if len(names) > 12 else ''}]"
