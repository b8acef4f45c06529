"""Two processes against one: the same gradient whatever each has to do, the same evaluation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.conftest import ROOT
from tests.distributed.worker import SCENARIOS, scenario_data
from tests.nets import batch_norm_net, group_norm_net
from tests.recipe_runs import LAUNCH, PROCESSES


@pytest.fixture(scope="module")
def results(tmp_path_factory, subprocess_env):
    """Results of the worker on one and on two processes."""
    found = {}
    for count, options in PROCESSES.items():
        target = tmp_path_factory.mktemp("distributed") / f"{count}.safetensors"
        command = [*LAUNCH, *options, str(ROOT / "tests/distributed/worker.py"), str(target)]
        done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[count] = load_file(target)
        assert int(found[count].pop("num_processes")) == count
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_update_is_the_mean_over_the_hard_rows_of_all_processes(results, name):
    net = group_norm_net()
    x, y = scenario_data(net, name)
    hard = torch.tensor(SCENARIOS[name], dtype=torch.bool)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    gradients = [torch.zeros_like(parameter) for parameter in net.parameters()]
    if hard.any():
        gradients = torch.autograd.grad(F.cross_entropy(net(x[hard]), y[hard]), list(net.parameters()))
    for count in (1, 2):
        found = results[count]
        for (key, _), gradient in zip(net.named_parameters(), gradients, strict=True):
            step = before[key] - found[f"group_norm/{name}/{key}"]
            torch.testing.assert_close(step, gradient, rtol=1e-6, atol=1e-12)
        totals = found[f"group_norm/{name}/totals"].tolist()
        assert totals[1:] == [hard.any(), hard.sum(), 16, 16]
        counts = found[f"group_norm/{name}/counts"]
        assert counts[0].tolist() == [int((hard & (y == c)).sum()) for c in range(4)]
        assert counts[1].tolist() == [int((y == c).sum()) for c in range(4)]


def test_nothing_moves_when_no_process_has_a_hard_row(results):
    for count in (1, 2):
        for kind, net in (("group_norm", group_norm_net()), ("batch_norm", batch_norm_net())):
            for key, value in net.state_dict().items():
                assert torch.equal(results[count][f"{kind}/none_anywhere/{key}"], value.double())


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "none_anywhere"])
def test_batch_norm_learns_and_stays_finite_when_a_process_idles(results, name):
    before = batch_norm_net().state_dict()
    for count in (1, 2):
        after = {key: results[count][f"batch_norm/{name}/{key}"] for key in before}
        assert all(torch.isfinite(value).all() for value in after.values())
        assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
        assert not torch.equal(after["6.weight"], before["6.weight"])


def test_evaluation_does_not_depend_on_the_number_of_processes(results):
    one, two = ({key: value for key, value in results[count].items() if "evaluation/" in key} for count in (1, 2))
    for key in ("clean", "pgd", "predictions", "autoattack_indices"):
        assert torch.equal(one[f"evaluation/{key}"], two[f"evaluation/{key}"]), key
    for found in (one, two):
        clean, pgd = found["evaluation/clean"], found["evaluation/pgd"]
        assert clean.sum() == sum(i % 5 != 0 for i in range(23))
        assert 0 < pgd.sum() < clean.sum()
        indices, auto = found["evaluation/autoattack_indices"], found["evaluation/autoattack_flags"]
        assert len(indices) == 7
        assert not (auto & ~clean[indices]).any()


def test_processes_that_do_not_know_of_each_other_are_refused(subprocess_env):
    # What `torchrun` on a CPU machine does without ACCELERATE_USE_CPU, as far as one process can tell.
    code = (
        "from accelerate import PartialState\n"
        "import os\n"
        "PartialState(cpu=True)\n"
        "os.environ['WORLD_SIZE'] = '2'\n"
        "from ham_hf.launching import create_accelerator\n"
        "create_accelerator(use_cpu=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True, timeout=99)
    assert done.returncode != 0
    assert "started 2 processes, but accelerate sees 1" in done.stderr
