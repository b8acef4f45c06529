"""How a run is stopped from outside: signals, a time limit, and the end of its launcher.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away. A run that trains finishes its update, saves and
exits with `EXIT_REQUEUE`; at any other time it exits at once with the same status. So does a second signal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that was stopped and continues with ``--resume_from_checkpoint latest``."""

SAME_REQUEST_SECONDS = 3.0
"""Signals this close together are one request: a scheduler signals all processes, and a launcher passes it on."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class TrainingStopped(Exception):  # noqa: N818 (it is no error)
    """Training ended early on request; everything up to here is in a checkpoint."""


class _StopNow(SystemExit):
    """A signal came where there is nothing to save."""


class StopRequests:
    """Requests to stop this process: by a signal, after ``max_hours`` from here, or as its launcher ended."""

    def __init__(self, max_hours: float | None = None, environment: Mapping[str, str] = os.environ) -> None:
        self._max_hours, self._since = max_hours, time.perf_counter()
        launched = "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment
        self._launcher = os.getppid() if launched else None
        self._pid = os.getpid()
        self._signal: str | None = None
        self._signaled_at = 0.0
        self._deferring = False

    def __call__(self) -> str | None:
        """The first reason to stop, in words; None if there is none."""
        if self._signal is not None:
            return self._signal
        if self._max_hours is not None and time.perf_counter() - self._since >= self._max_hours * 3600:
            return f"--max_train_hours {self._max_hours:g}"
        # accelerate launch passes no signal on to a single process: when it ends, that is the signal.
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the end of its launcher"
        return None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, signals are only noted: training calls this object where it can stop.

        Raises:
            SystemExit: at the end, if a signal came and training did not stop for it.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._signal is not None:
            raise _StopNow(EXIT_REQUEUE)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handler of `SIGNALS`."""
        now = time.perf_counter()
        again = self._signal is not None and now - self._signaled_at > SAME_REQUEST_SECONDS
        # A forked child has the handler of its parent, and nothing to save.
        if again or os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._signal is None:
            self._signal, self._signaled_at = signal.Signals(number).name, now
            if not self._deferring:
                raise _StopNow(EXIT_REQUEUE)


@contextlib.contextmanager
def stop_requests(output_dir: Path, max_hours: float | None = None) -> Iterator[StopRequests]:
    """Take requests to stop, and turn a stop into one line that says how to continue.

    Raises:
        SystemExit: with `EXIT_REQUEUE`, for `TrainingStopped` and where a signal finds nothing to save.
    """
    requests = StopRequests(max_hours)
    heard = SIGNALS
    if threading.current_thread() is not threading.main_thread():
        heard = ()  # Python lets the main thread alone take signals.
        logger.info("this run is not in the main thread: a signal ends the process without a checkpoint")
    before = {number: signal.signal(number, requests.on_signal) for number in heard}
    how = f"; the same command with --resume_from_checkpoint latest continues (status {EXIT_REQUEUE})\n"
    try:
        yield requests
    except TrainingStopped as stopped:
        sys.stderr.write(f"{stopped}{how}")
        raise SystemExit(EXIT_REQUEUE) from None
    except _StopNow:
        sys.stderr.write(f"stopped by {requests()} outside of training: nothing in {output_dir} is lost{how}")
        raise
    finally:
        # The request that stopped the run may signal once more while the process ends: the default would kill it.
        for number in [one for one in before if requests._signal is None or before[one] != signal.SIG_DFL]:
            signal.signal(number, before[number])
