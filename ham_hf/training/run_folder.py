"""The output folder of a run: its files, its lock, and saving when the disk is full or gone.

One run per folder: a lock on a file in it, by ``filelock``. The operating system ends the lock with the process: files
that a dead run left behind lock nothing. It holds between machines where the file system passes locks on (NFS 4,
Lustre mounted with ``flock``, CephFS). Without locks in the file system, the run warns and continues.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ham_hf.artifacts import BEST_NAME, PARTIAL_RESULTS, REPORT_NAME, TRAIN_CONFIG_NAME, WEIGHTS_NAME
from ham_hf.training.checkpoint import (
    ABANDONED,
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointWriteError,
    has_best,
    list_checkpoints,
    save_best,
    save_checkpoint,
)

logger = logging.getLogger(__name__)


class RunFiles:
    """Checkpoints, of which the ``keep`` newest stay, and selected weights of one run; for the main process only.

    A failed write is logged and tried again at the next save; training continues.
    """

    def __init__(self, output_dir: Path, keep: int | None) -> None:
        self.output_dir, self.keep = output_dir, keep
        self._waiting: tuple[dict[str, Tensor], Mapping[str, Any]] | None = None

    def select(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the selected weights; where that fails, keep a copy in memory until it is possible."""
        self._waiting = None
        try:
            save_best(self.output_dir, weights, state)
        except OSError as error:
            self._waiting = ({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, state)
            logger.error("the selected weights could not be written: %s; the next save tries again", error)

    def selection_is_lost(self) -> bool:
        """Whether the selected weights, written before, are neither on the disk nor in memory."""
        return self._waiting is None and not has_best(self.output_dir)

    def save(self, checkpoint: Checkpoint) -> CheckpointWriteError | None:
        """Write a checkpoint, after selected weights that still wait; returns why it could not be written."""
        try:
            save_checkpoint(self.output_dir, checkpoint, keep=self.keep, selected=self._waiting)
        except CheckpointWriteError as error:
            logger.error("%s; kept: %s; training continues, and the next save tries again", error, self.kept())
            return error
        self._waiting = None
        return None

    def kept(self) -> str:
        """The newest checkpoint on the disk, in words."""
        try:
            checkpoints = list_checkpoints(self.output_dir)
        except OSError as error:
            return f"unknown ({error})"
        return str(checkpoints[-1]) if checkpoints else "no checkpoint"


def check_output_dir(output_dir: Path, *, overwrite: bool, resume_from: str | None = None) -> None:
    """Reject an output folder with files that a training run would overwrite; nothing is written.

    Raises:
        ValueError: if the path is a file, or the folder holds anything and is neither to be replaced nor that of the
            run that is resumed.
    """
    if not _is_occupied(output_dir) or overwrite:
        return
    if resume_from is None:
        raise ValueError(
            f"--output_dir {output_dir} already holds files; name another folder, replace what is in it with "
            "--overwrite_output_dir, or continue a training run with --resume_from_checkpoint latest"
        )
    if resume_from != "latest" and Path(resume_from).resolve().parent != output_dir.resolve():
        raise ValueError(
            f"--output_dir {output_dir} already holds files, which are not those of the run of {resume_from}: name an "
            "empty folder, or continue the run in it with --resume_from_checkpoint latest"
        )
    finished = [name for name in (WEIGHTS_NAME, REPORT_NAME) if (output_dir / name).exists()]
    if finished and not list_checkpoints(output_dir):
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {output_dir} holds {' and '.join(finished)}, and no checkpoint "
            "to continue from; name another --output_dir, or replace what is in it with --overwrite_output_dir instead"
        )


def check_results_dir(output_dir: Path, owned: Collection[str], *, overwrite: bool) -> None:
    """Refuse an output folder for an evaluation or a calibration, which own these names.

    Neither ever replaces a training run, nor an evaluation a model. One that was interrupted is not refused: the same
    command continues it.

    Raises:
        ValueError: if the path is a file, or the folder holds files that are never replaced, or not to be replaced.
    """
    held, what, who = "a model", "an evaluation", "an evaluation"
    if WEIGHTS_NAME in owned:
        held, what, who = "a training run", "a calibrated model", "a calibration"
    if any((output_dir / name).exists() for name in {WEIGHTS_NAME, TRAIN_CONFIG_NAME, BEST_NAME} - {*owned}):
        raise ValueError(f"--output_dir {output_dir} holds {held}; {what} needs a folder of its own")
    # Partial results are removed last: beside them, the other files belong to an interrupted write.
    unfinished = (output_dir / PARTIAL_RESULTS).exists()
    if _is_occupied(output_dir, besides=(PARTIAL_RESULTS, *owned) if unfinished else ()) and not overwrite:
        raise ValueError(
            f"--output_dir {output_dir} already holds files; name another folder, or replace what {who} left in it "
            "with --overwrite_output_dir"
        )


def _is_occupied(output_dir: Path, besides: Collection[str] = ()) -> bool:
    """Whether a folder holds anything, ``besides`` aside; a file in its place is refused."""
    if not output_dir.exists():
        return False
    if not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; name a folder")
    # A run that was killed before it wrote anything leaves only its lock.
    return any(path.name not in (LOCK_NAME, OWNER_NAME, *besides) for path in output_dir.iterdir())


def clear_output_dir(output_dir: Path, owned: Collection[str]) -> None:
    """Make the output folder and remove what an earlier run wrote into it: a mistyped folder keeps its own files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in output_dir.iterdir():
        numbered = CHECKPOINT_NAME.fullmatch(path.name.removesuffix(ABANDONED)) or path.name.startswith(".checkpoint-")
        if path.name in owned or (WEIGHTS_NAME in owned and numbered):
            logger.info("removing %s", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


LOCK_NAME = ".run.lock"
OWNER_NAME = ".run.owner.json"
"""Who has the lock; Windows does not let other processes read a locked file."""
PATIENCE = 0.5
"""Seconds to try for: the owner may be ending, or be another process that only looks (`is_locked`)."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


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
            ValueError: naming process, machine and start of another run that has it.
            OSError: if the folder is not writable.
        """
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        make_folder(folder)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"--output_dir {folder} is in use by another run, {_describe(self._owner)}; wait for it, stop it "
                "(SIGTERM lets it save), or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _unwritable(folder, error) from error
            self.path.unlink(missing_ok=True)
            logger.warning(
                "the file system of %s has no locks (%s): make sure that no other run uses the folder",
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

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Whether a run uses ``folder``; False if that cannot be known (no locks there, or no right to write)."""
    if not (folder / LOCK_NAME).exists():
        return False
    try:
        with _lock(folder / LOCK_NAME):
            return False
    except OSError as error:
        return isinstance(error, Timeout)


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
    """Make an output folder, with those above it; an OSError names the setting and what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"--output_dir {folder} cannot be written ({error.strerror}); name a folder that can, or make room or get "
        "permission there"
    )
