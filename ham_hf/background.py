"""Something slow beside the training, which may take as long as it likes."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Does one thing at a time on a thread of its own.

    Other processes of a run wait at the next update for the one that is busy, and give up after ``--ddp_timeout``:
    whatever the network does has to be out of their way.

    Args:
        patience: seconds to wait for it before training goes on beside it.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._thread: threading.Thread | None = None

    def start(self, action: Callable[[], object]) -> None:
        """Begin, and wait a while for the end. An exception in ``action`` is shown on standard error, by its thread.

        Raises:
            RuntimeError: if the last one is not finished; ask `is_busy` first.
        """
        if self.is_busy():
            raise RuntimeError("one thing at a time")
        # A daemon: a run that ends, or is told to stop, does not wait for it.
        self._thread = threading.Thread(target=action, name="ham_hf-background", daemon=True)
        self._thread.start()
        self._thread.join(self.patience)

    def is_busy(self) -> bool:
        """Whether the last one is still not finished after waiting for it once more."""
        return not self.finish(self.patience)

    def finish(self, patience: float | None = None) -> bool:
        """Wait for the end of the last one, at most for ``patience`` seconds; returns whether it came."""
        if self._thread is not None:
            self._thread.join(patience)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True
