"""Every method on two processes against one: the same weights, class state and per-class log."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_distributed import WORKER
from tests.support.method_checks import every_method
from tests.support.recipe_runs import LAUNCH, PROCESSES, finish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory, subprocess_env):
    found = {}
    for count, options in PROCESSES.items():
        target = tmp_path_factory.mktemp("methods") / "found.safetensors"
        finish([*LAUNCH, *options, WORKER, "methods", str(target), str(target.parent)], subprocess_env)
        found[count] = load_file(target)
        assert int(found[count]["num_processes"]) == count
    return found


@pytest.mark.parametrize("label", every_method())
def test_two_processes_do_what_one_does(results, label):
    one, two = ({k: v for k, v in results[count].items() if k.startswith(f"{label}/")} for count in (1, 2))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.isfinite(value).all(), key
        # Rounding alone; gradients go through the network's float64, weights of rows through it as well.
        torch.testing.assert_close(
            two[key].double(), value.double(), rtol=1e-6, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}"
        )
