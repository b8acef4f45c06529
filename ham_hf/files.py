"""Durable files: replace in one step, fsync, write SHA-256 checksums next to them, verify on load; strict JSON.

The checksums of a folder are in ``SHA256SUMS``, in the format of the tool: ``sha256sum -c SHA256SUMS`` checks it too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A folder does not hold what was written into it; the message names file and reason."""


def atomic_write(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 in one step: a reader sees the old file or the new one, also after a crash or error."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; after the block, flush the file and rename it to ``path``.

    An error in the block removes the temporary file and leaves ``path`` as it was.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def replace(part: Path, path: Path) -> None:
    """Flush the file ``part`` to the disk and rename it to ``path``, in the same file system, which it replaces."""
    flush(part)
    os.replace(part, path)
    flush(path.parent)


def parse_json(text: str) -> Any:  # noqa: ANN401 (whatever the text holds)
    """Parse JSON, or raise ValueError, also for ``NaN`` and ``Infinity``, which Python accepts."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, parse_constant=refuse)


def front_matter(text: str) -> str:
    """The YAML at the top of a README.md of the Hub; empty without."""
    found = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
    return found[1] if found else ""


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open folders, and orders renames itself.
    # Windows flushes only files that are open for writing.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush folders; for content every error counts.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in ``folder``; call it after the last file is written."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS).write_text("".join(lines))


def check_checksums(folder: Path, required: Iterable[str]) -> None:
    """Check the files of ``folder`` against the checksums of `write_checksums`; ``required`` ones have to be listed.

    Raises:
        DamagedError: naming the first file that is missing, unlisted or changed.
    """
    try:
        text = (folder / CHECKSUMS).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DamagedError(f"{CHECKSUMS} {reason}") from error
    listed = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise DamagedError(f"{CHECKSUMS} holds a line that is not a checksum")
        listed[match[2]] = match[1]
    for name in required:
        if name not in listed:
            raise DamagedError(f"{CHECKSUMS} does not list {name}")
    for name, expected in listed.items():
        try:
            found = sha256(folder / name)
        except FileNotFoundError as error:
            raise DamagedError(f"{name} is missing") from error
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error})") from error
        if found != expected:
            raise DamagedError(
                f"{name} is not the file that was written (SHA-256 {found[:8]}.., not {expected[:8]}..)"
            )
