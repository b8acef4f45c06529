"""Run the unfinished runs of a comparison, each through the ordinary trainer, and collect all that have a report.

A run prints into ``<run folder>.log``. Its folder is locked while it runs (`ham_hf.training.run_folder`), so two
comparisons never train in one folder, even if the first was killed and left its children running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ham_hf.artifacts import BEST_NAME, LOG_NAME, REPORT_NAME, TRAIN_CONFIG_NAME
from ham_hf.comparison.differences import differences, run_settings
from ham_hf.comparison.existing import finished_run, running_elsewhere
from ham_hf.comparison.pairs import FinishedRun
from ham_hf.comparison.plan import PlannedRun
from ham_hf.comparison.table import MissingRun
from ham_hf.config import CalibrationConfig, config_to_dict, load_train_config
from ham_hf.reporting.report import read_report
from ham_hf.settings import settings_of
from ham_hf.training.checkpoint import list_checkpoints, replace_folder
from ham_hf.training.run_folder import LOCK_NAME, is_locked

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0
"""How long an interrupted run may take to stop before it is killed; its checkpoints survive that."""
SHOWN_LOG_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How a run is started: the words before its settings, and its environment variables."""

    command: tuple[str, ...]
    environment: Mapping[str, str]

    def words(self, run: PlannedRun) -> list[str]:
        """The command line of ``run``; one that has begun, here or with the weights of another, is resumed."""
        begun = run.weights_from is not None or (run.folder.is_dir() and any(run.folder.iterdir()))
        return [*self.command, *run.words, *(["--resume_from_checkpoint=latest"] if begun else [])]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Child:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    started: float


class UnreadableRunError(ValueError):
    """A run's folder holds a report or a configuration that cannot be read."""


def is_done(run: PlannedRun) -> bool:
    """Whether the run's folder holds its report.

    Raises:
        UnreadableRunError: if the folder holds a run that cannot be read.
        ValueError: if it holds a run, finished or not, with other settings.
    """
    report, config = run.folder / REPORT_NAME, run.folder / TRAIN_CONFIG_NAME
    try:
        if report.is_file():
            theirs: Mapping[str, object] = read_report(report).config
        elif config.is_file():
            theirs = config_to_dict(load_train_config(config))
        else:
            return False
    except (ValueError, OSError) as error:
        raise UnreadableRunError(f"{error}; delete its folder to run it again") from error
    changed = differences(run_settings(config_to_dict(run.config)), run_settings(theirs))
    if changed:
        raise ValueError(
            f"{run.folder} holds a run with other settings ({'; '.join(changed)}): name another --output_dir, or "
            "delete this folder to run it again"
        )
    return report.is_file()


def survey(
    runs: Sequence[PlannedRun], chosen: Collection[PlannedRun]
) -> tuple[list[PlannedRun], list[PlannedRun], list[MissingRun]]:
    """The runs that are done, those of ``chosen`` that are to be run, and those that can be neither.

    These are unreadable, or have other settings and are not among the chosen.

    Raises:
        ValueError: naming every chosen run whose folder holds a run with other settings.
    """
    done, waiting, unusable = list[PlannedRun](), list[PlannedRun](), list[MissingRun]()
    problems = []
    for run in runs:
        try:
            if is_done(run):
                done.append(run)
            elif run in chosen:
                waiting.append(run)
        except UnreadableRunError as error:  # noqa: PERF203 (every problem is wanted, not the first)
            unusable.append(MissingRun(label=run.label, seed=run.seed, reason=str(error), state="failed"))
        except ValueError as error:
            if run in chosen:
                problems.append(str(error))
            else:
                unusable.append(MissingRun(label=run.label, seed=run.seed, reason=str(error), state="not run"))
    if problems:
        raise ValueError("\n".join(problems))
    return done, waiting, unusable


def execute(
    runs: Sequence[PlannedRun], launcher: Launcher, *, jobs: int, announce: Callable[[str], None]
) -> list[MissingRun]:
    """Run the unfinished runs, ``jobs`` at a time; return those that failed or that another process is running.

    A failed run does not stop the others. ``announce`` takes a line when a run starts and when it ends.

    Raises:
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, when every run that was under way has stopped.
    """
    waiting, running, failed = deque(runs), list[_Child](), list[MissingRun]()

    def fail(run: PlannedRun, problem: str) -> None:
        announce(f"FAILED {run.label} seed {run.seed}: {problem}")
        failed.append(MissingRun(label=run.label, seed=run.seed, reason=problem, state="failed"))

    def leave(run: PlannedRun) -> None:
        announce(
            f"RUNNING {run.label} seed {run.seed}: another process is running it: {run.folder / LOCK_NAME} is locked"
        )
        failed.append(running_elsewhere(run.label, run.seed))

    # Signals reach this thread alone: a run that is being started when one comes is stopped like the others.
    with _signals_interrupt(), ThreadPoolExecutor(1) as starter:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = _next_ready(waiting, [child.run for child in running])
                    if run is None:
                        break
                    if is_locked(run.folder):
                        leave(run)
                        continue
                    try:
                        begun = starter.submit(_start, run, launcher, jobs, running).result()
                    except (ValueError, OSError) as error:
                        fail(run, str(error))
                        continue
                    if begun:
                        announce(f"start {run.label} seed {run.seed}, log {run.log}")
                time.sleep(POLL_SECONDS)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    seconds = time.monotonic() - child.started
                    if child.process.returncode == 0 and (child.run.folder / REPORT_NAME).is_file():
                        announce(f"done {child.run.label} seed {child.run.seed} in {seconds:.0f} s")
                    elif is_locked(child.run.folder):  # by another comparison, which was first
                        leave(child.run)
                    else:
                        fail(child.run, _failure(child))
        finally:
            starter.shutdown()
            _stop(running)
    return failed


def collect(runs: Sequence[PlannedRun], failed: Sequence[MissingRun]) -> tuple[list[FinishedRun], list[MissingRun]]:
    """The planned runs that have a report, and those that have none."""
    reasons = {(run.label, run.seed): run for run in failed}
    finished, missing = [], []
    for run in runs:
        known = reasons.get((run.label, run.seed))
        if (run.folder / REPORT_NAME).is_file() and (known is None or known.state == "running"):
            try:
                report = read_report(run.folder)
                finished.append(finished_run(report, run.folder, source=str(run.folder), label=run.label))
            except (ValueError, OSError) as error:
                missing.append(MissingRun(label=run.label, seed=run.seed, reason=str(error), state="failed"))
        elif known is not None:
            missing.append(known)
        elif is_locked(run.folder):
            missing.append(running_elsewhere(run.label, run.seed))
        else:
            reason = "not started: left out by --only or --seeds"
            missing.append(MissingRun(label=run.label, seed=run.seed, reason=reason, state="not run"))
    return finished, missing


def _start(run: PlannedRun, launcher: Launcher, jobs: int, running: list[_Child]) -> bool:
    """Start a run in its own session, so that Ctrl-C reaches it once, from here; False if it is done by now."""
    if is_done(run):
        return False
    if run.weights_from is not None:
        bring_weights(run, run.weights_from)
    words = launcher.words(run)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        log.write(f"# at most {jobs} run(s) at a time\n$ {shlex.join(words)}\n".encode())
        log.flush()
        process = subprocess.Popen(  # noqa: S603 (the words are ours, and no shell reads them)
            words,
            env=dict(launcher.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running.append(_Child(run=run, process=process, started=time.monotonic()))
    return True


def _next_ready(waiting: deque[PlannedRun], running: Sequence[PlannedRun]) -> PlannedRun | None:
    """Remove and return the first run that needs no weights of an unfinished run; None if all do."""
    busy = {run.folder for run in (*waiting, *running)}
    for run in waiting:
        if run.weights_from not in busy:
            waiting.remove(run)
            return run
    return None


def bring_weights(run: PlannedRun, source: Path) -> None:
    """Copy the results of the finished run in ``source`` to a run that does not train, which continues at its end.

    Raises:
        ValueError: if that run is not finished, or its settings differ in more than the calibration.
    """
    if run.folder.is_dir() and any(run.folder.iterdir()):
        return
    if not (source / REPORT_NAME).is_file():
        raise ValueError(f"its weights are those of {source}, which is not finished: run that first")
    theirs = read_report(source).config
    calibration = {known.name for known in settings_of(CalibrationConfig)}
    ours, made = (run_settings(config, without=calibration) for config in (config_to_dict(run.config), theirs))
    if changed := differences(ours, made):
        raise ValueError(
            f"{source} holds a run with other settings ({'; '.join(changed)}), whose weights cannot be taken"
        )
    checkpoints = list_checkpoints(source)
    if not checkpoints or not (source / BEST_NAME).is_dir():
        raise ValueError(f"{source} has no checkpoint any more, so its weights cannot be taken; run it again")
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=run.folder.parent, prefix=f".{run.folder.name}-") as temporary:
        staging = Path(temporary) / run.folder.name
        staging.mkdir()
        for part in (source / BEST_NAME, checkpoints[-1]):
            shutil.copytree(part, staging / part.name)
        shutil.copy(source / LOG_NAME, staging)
        if run.folder.is_dir():
            run.folder.rmdir()
        replace_folder(staging, run.folder)


def _failure(child: _Child) -> str:
    code = child.process.returncode
    status = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    if code == 0:
        status = f"status 0, but no {REPORT_NAME}"
    text = child.run.log.read_bytes()[-20_000:].decode(errors="replace")
    own = text.rpartition("\n$ ")[2]
    lines = [line.rstrip() for line in own.splitlines()[1:] if line.strip()]
    return "\n  ".join([f"{status}; the end of {child.run.label}/{child.run.log.name}:", *lines[-SHOWN_LOG_LINES:]])


def _stop(children: Sequence[_Child]) -> None:
    """Interrupt the runs, as Ctrl-C would; kill those that do not stop, or all of them at a second Ctrl-C."""
    # What a shell runs in the background ignores Ctrl-C, and so does what it starts.
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    _signal(children, signal.SIGTERM if ignored else signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        while any(child.process.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        _signal(children, getattr(signal, "SIGKILL", signal.SIGTERM))
        for child in children:
            child.process.wait()


def _signal(children: Sequence[_Child], number: signal.Signals) -> None:
    for child in children:
        # To the whole session: a launcher's workers are in it, and may outlive the launcher. It may also be gone.
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(child.process.pid, number)
            else:  # Windows, which has no signals for other processes
                child.process.terminate()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP act like Ctrl-C: the runs, in their own sessions, would outlive this process."""
    known = [signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
