"""What the network does is out of the way of a run whose other processes wait for this one."""

from __future__ import annotations

import threading
import time

import pytest

from ham_hf.background import Background

pytestmark = pytest.mark.faults(quick=True)


def test_what_is_quick_is_done_when_start_returns():
    done: list[int] = []
    background = Background(patience=30)
    for number in range(3):
        assert not background.is_busy()
        background.start(lambda number=number: done.append(number))
        assert done == list(range(number + 1))
    assert background.finish(0)


def test_what_takes_long_goes_on_beside():
    release = threading.Event()
    background = Background(patience=0.05)
    since = time.monotonic()
    background.start(release.wait)
    assert time.monotonic() - since < 10
    assert background.is_busy()
    with pytest.raises(RuntimeError, match="one thing at a time"):
        background.start(release.wait)
    assert not background.finish(0.05)
    release.set()
    assert background.finish()
    assert not background.is_busy()
