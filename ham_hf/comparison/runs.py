"""The runs of a comparison: run what is not done yet, each through the ordinary trainer, and read what there is.

A run prints into ``<run folder>.log``, which is locked as long as one of its processes lives: two comparisons never
train in one folder, also when the first was killed and left its children behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ham_hf.comparison.facts import differences, run_settings
from ham_hf.comparison.numbers import MissingRun, Run
from ham_hf.comparison.plan import PlannedRun
from ham_hf.config import config_to_dict, load_train_config
from ham_hf.report import REPORT_NAME, RunReport, read_report

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0
"""How long an interrupted run may take to stop before it is killed; its checkpoints are safe either way."""
SHOWN_LOG_LINES = 3
HUB_ID = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@(\S+))?")


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How a run is started.

    Attributes:
        command: words before the settings: interpreter or launcher, and the training recipe.
        environment: environment variables of the run.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]

    def words(self, run: PlannedRun) -> list[str]:
        """The command line of ``run``; one that has begun goes on from its last checkpoint."""
        begun = run.folder.is_dir() and any(run.folder.iterdir())
        return [*self.command, *run.words, *(["--resume_from_checkpoint=latest"] if begun else [])]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Child:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    started: float


def is_done(run: PlannedRun) -> bool:
    """Whether the run's folder holds its report.

    Raises:
        ValueError: if the folder holds a run, finished or not, with other settings, or one that cannot be read.
    """
    report, config = run.folder / REPORT_NAME, run.folder / "train_config.yaml"
    if report.is_file():
        theirs: Mapping[str, object] = read_report(report).config
    elif config.is_file():
        theirs = config_to_dict(load_train_config(config))
    else:
        return False
    changed = differences(run_settings(config_to_dict(run.config)), run_settings(theirs))
    if changed:
        raise ValueError(
            f"{run.folder} holds a run with other settings ({'; '.join(changed)}): name another --output_dir, or "
            "delete this folder to run it again"
        )
    return report.is_file()


def execute(
    runs: Sequence[PlannedRun], launcher: Launcher, *, jobs: int, announce: Callable[[str], None]
) -> list[MissingRun]:
    """Run what is not done, ``jobs`` at a time; a run that fails does not keep the others from running.

    Args:
        runs: what to run, in order; their folders have been looked at (`is_done`).
        launcher: how to start one.
        jobs: number of runs at a time.
        announce: takes a line when a run starts and when it ends.

    Returns:
        The runs that failed.

    Raises:
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, when every run that was under way has stopped.
    """
    waiting, running, failed = deque(runs), list[_Child](), list[MissingRun]()

    def fail(run: PlannedRun, reason: str) -> None:
        announce(f"FAILED {run.label} seed {run.seed}: {reason}")
        failed.append(MissingRun(label=run.label, seed=run.seed, reason=reason, failed=True))

    with _signals_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.popleft()
                    try:
                        child = _start(run, launcher)
                    except (ValueError, OSError) as error:
                        fail(run, str(error))
                        continue
                    if child is not None:
                        running.append(child)
                        announce(f"start {run.label} seed {run.seed}, log {run.log}")
                time.sleep(POLL_SECONDS)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    seconds = time.monotonic() - child.started
                    if child.process.returncode == 0 and (child.run.folder / REPORT_NAME).is_file():
                        announce(f"done {child.run.label} seed {child.run.seed} in {seconds:.0f} s")
                    else:
                        fail(child.run, _failure(child))
        finally:
            _stop(running)
    return failed


def collect(runs: Sequence[PlannedRun], failed: Sequence[MissingRun]) -> tuple[list[Run], list[MissingRun]]:
    """The planned runs that have a report, and those that have none."""
    reasons = {(run.label, run.seed): run for run in failed}
    finished, missing = [], []
    for run in runs:
        if (run.label, run.seed) in reasons:
            missing.append(reasons[run.label, run.seed])
        elif (run.folder / REPORT_NAME).is_file():
            report = read_report(run.folder)
            finished.append(Run(label=run.label, seed=run.seed, report=report, source=str(run.folder)))
        else:
            reason = "not started: left out by --only"
            missing.append(MissingRun(label=run.label, seed=run.seed, reason=reason, failed=False))
    return finished, missing


def read_runs(
    sources: Sequence[str], download: Callable[[str, str | None], Path]
) -> list[tuple[str, str | None, RunReport]]:
    """Read the reports of runs that exist.

    Args:
        sources: folders with a ``report.json``, folders of comparisons, and Hub ids ``OWNER/NAME[@REVISION]``.
        download: fetches the report of a Hub id and revision, and returns its path.

    Returns:
        (source, label, report) of each; the label is the name of the folder above where the folder is called
        ``seed<seed of the report>``, as in a comparison, else None.

    Raises:
        ValueError: if a source is none of these, or has no report that can be read.
    """
    found = []
    for source in sources:
        path, hub_id = Path(source), HUB_ID.fullmatch(source)
        if path.is_dir():
            folders = [path] if (path / REPORT_NAME).is_file() else _comparison_folders(path)
            for folder in folders:
                report = read_report(folder)
                place = folder.resolve()
                label = place.parent.name if place.name == f"seed{report.seeds.get('seed')}" else None
                found.append((str(folder), label, report))
        elif hub_id is not None and not path.exists():
            try:
                report = read_report(download(hub_id[1], hub_id[2]))
            except ValueError as error:
                raise ValueError(f"there is no folder {source}, and {error}") from error
            found.append((source, None, report))
        else:
            raise ValueError(f"{source}: expected a folder with {REPORT_NAME}, or OWNER/NAME on the Hub")
    return found


def _comparison_folders(path: Path) -> list[Path]:
    reports = sorted([*path.glob(f"seed*/{REPORT_NAME}"), *path.glob(f"*/seed*/{REPORT_NAME}")])
    if not reports:
        raise ValueError(f"{path} has no {REPORT_NAME}, and no folder LABEL/seedN with one: has the run finished?")
    return [report.parent for report in reports]


def _start(run: PlannedRun, launcher: Launcher) -> _Child | None:
    """Start a run in a session of its own, so that Ctrl-C reaches it once, from here; None if it is done by now.

    Raises:
        ValueError: if another process is at it.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        try:
            # The lock belongs to the open file, which the child inherits: it lasts as long as the child does.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is running it: {run.log} is locked") from None
        if is_done(run):
            return None
        words = launcher.words(run)
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        process = subprocess.Popen(  # noqa: S603 (the words are ours, and no shell reads them)
            words,
            env=dict(launcher.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Child(run=run, process=process, started=time.monotonic())


def _failure(child: _Child) -> str:
    """Status and last lines of the log."""
    code = child.process.returncode
    status = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    if code == 0:
        status = f"status 0, but no {REPORT_NAME}"
    text = child.run.log.read_bytes()[-20_000:].decode(errors="replace")
    own = text.rpartition("\n$ ")[2]
    lines = [line.rstrip() for line in own.splitlines()[1:] if line.strip()]
    return "\n  ".join([f"{status}; the end of {child.run.log}:", *lines[-SHOWN_LOG_LINES:]])


def _stop(children: Sequence[_Child]) -> None:
    """Interrupt what still runs, as Ctrl-C would; kill what does not stop, or at once at a second Ctrl-C."""
    _signal(children, signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        while any(child.process.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        _signal(children, signal.SIGKILL)
        for child in children:
            child.process.wait()


def _signal(children: Sequence[_Child], number: signal.Signals) -> None:
    for child in children:
        # To the whole session: a launcher's workers are in it, and may outlive the launcher. It may also be gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does: the runs, in sessions of their own, would outlive this process."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
