"""One run per output folder: a lock on a file in it, by ``filelock``.

The operating system ends the lock with the process, even if a forked child lives on: files that a dead run left behind
lock nothing. The lock holds between the processes of one machine, and between machines where the file system passes
locks on (NFS 4, Lustre mounted with ``flock``, CephFS). Without locks in the file system, the run warns and continues.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"
OWNER_NAME = ".run.owner.json"
"""Who has the lock. Windows does not let other processes read a locked file, so this is another one."""
PATIENCE = 0.5
"""Seconds to try for: the owner may be ending, or be another process that only looks (`is_locked`)."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class BusyFolderError(ValueError):
    """Another run uses the output folder."""


class RunLock:
    """The lock of one output folder; as a context manager it is released at the end, if it was acquired.

    Args:
        folder: the output folder; created when the lock is acquired, and removed at the end if it is empty then.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._owner = folder / LOCK_NAME, folder / OWNER_NAME
        self._lock = _lock(self.path)
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            BusyFolderError: naming process, machine and start of the run that has it.
            OSError: if the folder is not writable.
        """
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        make_folder(folder)
        try:
            self._lock.acquire()
        except Timeout:
            raise BusyFolderError(
                f"--output_dir {folder} is in use by another run, {_describe(self._owner)}; wait for it, stop it "
                "(SIGTERM lets it save), or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _unwritable(folder, error) from error
            self.path.unlink(missing_ok=True)
            logger.warning(
                "the file system of %s knows no locks (%s): see to it that no other run uses the folder",
                folder,
                error.strerror,
            )
            return
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))

    def release(self) -> None:
        """Release the lock and remove its files; does nothing if it was not acquired."""
        if self._lock.is_locked:
            # While it is still locked, so that no other run's files are removed. The folder may be gone or read-only.
            with contextlib.suppress(OSError):
                self._owner.unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
            self._lock.release()
        with contextlib.suppress(OSError):  # not empty: there is something to keep
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Whether a run uses ``folder``; False if that cannot be known (no locks there, or no right to write)."""
    if not (folder / LOCK_NAME).exists():
        return False
    try:
        with _lock(folder / LOCK_NAME):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _lock(path: Path) -> FileLock:
    # fallback_to_soft would replace a missing lock by a file that outlives a killed run on another machine.
    return FileLock(path, timeout=PATIENCE, thread_local=False, fallback_to_soft=False)


def _describe(owner: Path) -> str:
    try:
        values = json.loads(owner.read_text())
        return f"process {int(values['pid'])} on {values['host']}, since {values['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which does not say whose it is"


def make_folder(folder: Path) -> None:
    """Make an output folder, with those above it.

    Raises:
        OSError: naming the setting and what to do, where the system's message names neither.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"--output_dir {folder} cannot be written ({error.strerror}); name a folder that can, or make room or get "
        "permission there"
    )
