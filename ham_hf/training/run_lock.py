"""One run per output folder: a lock of the operating system on a file in it.

The lock belongs to the open file. It ends with the process, however that ends: a file left behind by a dead run locks
nothing. It holds between the processes of one machine, and between machines where the file system passes locks on
(NFS 4, Lustre mounted with ``flock``, CephFS); where the file system knows no locks, the run says so and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_open_here: set[int] = set()


class BusyFolderError(ValueError):
    """Another run is at work in the output folder."""


def _close_in_child() -> None:
    # The lock would last as long as a forked child, which may outlive a run that was killed.
    while _open_here:
        os.close(_open_here.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """The lock of one output folder; as a context manager it is released at the end, if it was acquired.

    Args:
        folder: the output folder; made when the lock is acquired, and removed again if nothing else came into it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._handle: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock, or refuse the run.

        Raises:
            BusyFolderError: if another run has it, with its process, machine and start.
            OSError: if nothing can be written into the folder.
        """
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        make_folder(folder)
        while True:
            with _named(folder):
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(handle)
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    break
            except FileNotFoundError:
                pass  # Its last owner removed it between our opening and our locking: it is nobody's, take another.
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        self._handle = handle
        _open_here.add(handle)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(owner).encode())

    def _lock(self, handle: int) -> None:
        if fcntl is None:
            logger.warning("no lock on this system: see to it that no other run uses %s", self.path.parent)
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyFolderError(
                f"--output_dir {self.path.parent} is in use by another run, {_owner(handle)}; wait for it, stop it "
                "(SIGTERM lets it save), or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "the file system of %s knows no locks (%s): see to it that no other run uses the folder",
                self.path.parent,
                error.strerror,
            )

    def release(self) -> None:
        """Give the lock back; does nothing if it was not acquired."""
        if self._handle is None:
            return
        # While it is still locked, so that nobody else's file is removed. The folder may be gone or read-only.
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        _open_here.discard(self._handle)
        os.close(self._handle)
        self._handle = None
        with contextlib.suppress(OSError):  # not empty: there is something to keep
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.read(handle, 4096))
        return f"process {int(owner['pid'])} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which does not say whose it is"


def make_folder(folder: Path) -> None:
    """Make an output folder, with those above it.

    Raises:
        OSError: naming the setting and what to do, where the system's message names neither.
    """
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"--output_dir {folder} cannot be written ({error.strerror}); name a folder that can, or make room or get "
            "permission there"
        ) from error
