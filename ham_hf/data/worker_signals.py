"""Signals that stop a run are for the run, not for the processes that decode its images."""

from __future__ import annotations

import os
import signal
import threading


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
