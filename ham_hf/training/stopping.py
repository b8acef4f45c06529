"""How a run is stopped from outside: signals, a time limit, and the end of its launcher.

SIGTERM and SIGUSR1 are what schedulers send before they take a machine away. While it trains, a run that is asked to
stop finishes its update, saves and leaves with `EXIT_REQUEUE`; at any other time there is nothing to save, and it
leaves at once with the same status. A second signal ends the process at once.
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
"""Exit status (EX_TEMPFAIL) of a run that was stopped and goes on with ``--resume_from_checkpoint latest``."""

SAME_REQUEST_SECONDS = 3.0
"""Signals this close together are one request: a scheduler signals all processes, and a launcher passes it on."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class TrainingStopped(Exception):  # noqa: N818 (it is no error)
    """Training ended early because somebody asked for it; everything up to here is in a checkpoint."""


class _StopNow(SystemExit):
    """A signal came where there is nothing to save."""


class StopRequests:
    """Who has asked this process to stop.

    Args:
        max_hours: hours after which the process asks itself to; None: never. They count from here.
        environment: variables of the process; they tell whether it has a launcher.
    """

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
        """Inside, signals are only noted: whoever runs there calls this object at moments at which it can stop.

        Raises:
            SystemExit: at the end, if a signal came and nobody stopped for it.
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
    """Take requests to stop, and turn a stop into one line that says how to go on.

    Args:
        output_dir: output folder, for the line.
        max_hours: see `StopRequests`.

    Raises:
        SystemExit: with `EXIT_REQUEUE`, instead of `TrainingStopped`, and where a signal finds nothing to save.
    """
    requests = StopRequests(max_hours)
    heard = SIGNALS
    if threading.current_thread() is not threading.main_thread():
        heard = ()  # Python lets the main thread alone take signals.
        logger.info("this run is not in the main thread: a signal ends the process without a checkpoint")
    before = {number: signal.signal(number, requests.on_signal) for number in heard}
    how = f"; the same command with --resume_from_checkpoint latest goes on (status {EXIT_REQUEUE})\n"
    try:
        yield requests
    except TrainingStopped as stopped:
        sys.stderr.write(f"{stopped}{how}")
        raise SystemExit(EXIT_REQUEUE) from None
    except _StopNow:
        sys.stderr.write(f"stopped by {requests()} outside of training: nothing in {output_dir} is lost{how}")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
