"""Files that are on the disk for sure: flushed, with SHA-256 checksums beside them, and checked against these.

The checksums of a folder are in ``SHA256SUMS``, in the format of the tool, so that ``sha256sum -c SHA256SUMS`` checks
the folder too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A folder is not what was written into it; the message names file and reason."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, have reached the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders, and orders renames itself.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems refuse it for folders; for content every error counts.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in ``folder``, the last file that it gets."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS).write_text("".join(lines))


def check_checksums(folder: Path, *, required: Iterable[str], known: Iterable[str]) -> None:
    """Check the files of ``folder`` against its checksums.

    Args:
        folder: what `write_checksums` was called for.
        required: files that have to be there.
        known: files that have to be listed if they are there; others, which somebody put beside them, are nobody's
            business.

    Raises:
        DamagedError: naming the first file that is missing, unlisted or another one, and why.
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
            raise DamagedError(f"{CHECKSUMS} holds a line that is no checksum")
        listed[match[2]] = match[1]
    for name in required:
        if name not in listed:
            raise DamagedError(f"{CHECKSUMS} does not list {name}")
    for name in known:
        if name not in listed and (folder / name).exists():
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
