"""Tests run offline, on the CPU, with few threads, and never touch the user's caches."""

from __future__ import annotations

import os
import time
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
torch.set_num_threads(1)
# Nothing fails because a machine is slow or busy.
hypothesis.settings.register_profile("ham_hf", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("ham_hf")

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave long tests to the commands that ask for them with ``-m``: ``make test`` and ``make faults``."""
    asked = config.option.markexpr
    for item in items:
        if "subprocess_env" in item.fixturenames:
            item.add_marker(pytest.mark.program)
        fault = item.get_closest_marker("faults")
        if fault is not None and not fault.kwargs.get("quick", False) and "faults" not in asked:
            item.add_marker(pytest.mark.skip(reason="a long fault test: make faults runs it"))
        elif item.get_closest_marker("slow") is not None and not {"slow", "faults"} & set(asked.split()):
            item.add_marker(pytest.mark.skip(reason="a slow test: make test runs it"))


@pytest.fixture(scope="session")
def subprocess_env(tmp_path_factory):
    """Environment for programs that tests start: CPU, one thread, offline, caches of their own."""
    home = tmp_path_factory.mktemp("hf_home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ACCELERATE_"))}
    return kept | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
        "MPLCONFIGDIR": str(home),
    }


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been waited for."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def quick_autoattack(monkeypatch):
    """The attacks of AutoAttack with few steps, for what is done around them; gives their class."""
    from ham_hf.evaluation import autoattack

    full = autoattack.require_autoattack()

    class Quick(full):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.square.n_queries = 5
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = 2

    monkeypatch.setattr(autoattack, "require_autoattack", lambda: Quick)
    return Quick
