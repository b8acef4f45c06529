"""Processes that decode images: how they are started, and kept alive when a signal stops the whole run."""

from __future__ import annotations

import os
import signal
import sys
import threading


def start_method(num_workers: int) -> str | None:
    """How a DataLoader starts its workers: by fork on Linux; None = as Python does elsewhere, or without workers.

    Python 3.14 starts them by forkserver, which imports torch again in each worker, for every epoch.
    """
    return "fork" if num_workers > 0 and sys.platform == "linux" else None


def shield_worker(worker_id: int) -> None:
    """Let a data-loading process outlive a signal to all processes of a run: the run still needs it to save.

    The ``worker_init_fn`` of a DataLoader. SIGTERM of the process that started the worker ends it as before.

    Args:
        worker_id: number of the worker, which does not matter.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS, Windows: no way to see who sent it
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
