"""Several processes, and sharded weights, against one process: the same gradient whatever each has to do.

And the same evaluation, and the same run when it continues with another number of processes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.conftest import ROOT
from tests.distributed.legs import METHODS, RELAY, RELAY_METHOD, make_trainer, no_random_start, outcome
from tests.distributed.worker import SCENARIOS, scenario_data
from tests.support.nets import batch_norm_net, group_norm_net
from tests.support.recipe_runs import CONFIGURED, finish
from tests.support.training import log_of

pytestmark = pytest.mark.slow

WORKER = str(ROOT / "tests/distributed/worker.py")
ENGINES = {
    "two": CONFIGURED["cpu.yaml"],
    "one": CONFIGURED["single_gpu.yaml"],
    "four": [*CONFIGURED["ddp.yaml"], "--num_processes=4"],
    "sharded": [*CONFIGURED["fsdp.yaml"], "--num_processes=2", "--fsdp_min_num_params=10"],
}
COUNTS = {"two": 2, "one": 1, "four": 4, "sharded": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the relay runs from process to process."""
    return tmp_path_factory.mktemp("relay")


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory, subprocess_env):
    """Results of the worker with each launch configuration."""
    found = {}
    # The files alone have to do.
    env = {name: value for name, value in subprocess_env.items() if name != "ACCELERATE_USE_CPU"}
    for engine, options in ENGINES.items():
        target = tmp_path_factory.mktemp("distributed") / f"{engine}.safetensors"
        where = folder / ("sharded" if engine == "sharded" else "relay")
        finish([*options, WORKER, "engine", str(target), str(where)], env)
        found[engine] = load_file(target)
        assert int(found[engine].pop("num_processes")) == COUNTS[engine]
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
    for found in results.values():
        for (key, _), gradient in zip(net.named_parameters(), gradients, strict=True):
            step = before[key] - found[f"group_norm/{name}/{key}"]
            torch.testing.assert_close(step, gradient, rtol=1e-6, atol=1e-12)
        totals = found[f"group_norm/{name}/totals"].tolist()
        assert totals[1:] == [hard.any(), hard.sum(), 16, 16]
        counts = found[f"group_norm/{name}/counts"]
        assert counts[0].tolist() == [int((hard & (y == c)).sum()) for c in range(4)]
        assert counts[1].tolist() == [int((y == c).sum()) for c in range(4)]


def test_nothing_moves_when_no_process_has_a_hard_row(results):
    for found in results.values():
        for kind, net in (("group_norm", group_norm_net()), ("batch_norm", batch_norm_net())):
            for key, value in net.state_dict().items():
                assert torch.equal(found[f"{kind}/none_anywhere/{key}"], value.double())


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "none_anywhere"])
def test_batch_norm_learns_and_stays_finite_when_a_process_idles(results, name):
    before = batch_norm_net().state_dict()
    for found in results.values():
        after = {key: found[f"batch_norm/{name}/{key}"] for key in before}
        assert all(torch.isfinite(value).all() for value in after.values())
        assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
        assert not torch.equal(after["6.weight"], before["6.weight"])


@pytest.mark.faults(quick=True)
def test_evaluation_does_not_depend_on_the_number_of_processes(results):
    for found in (results["one"], results["two"]):
        for key, value in results["one"].items():
            if key.endswith("_margins"):
                # A process that halves its batches rounds in another way.
                torch.testing.assert_close(found[key], value)
            elif key.startswith("evaluation/"):
                assert torch.equal(found[key], value), key
        clean, pgd = found["evaluation/clean_flags"], found["evaluation/pgd_flags"]
        assert clean.sum() == sum(i % 5 != 0 for i in range(23))
        assert 0 < pgd.sum() < clean.sum()
        indices, auto = found["evaluation/autoattack_indices"], found["evaluation/autoattack_flags"]
        assert len(indices) == 7
        assert not (auto & ~clean[indices]).any()


def trained(results, engine, label):
    prefix = f"trained/{label}"
    return {key.removeprefix(prefix): value for key, value in results[engine].items() if key.startswith(prefix)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_sharded_weights_train_to_the_same_network(results, method, tmp_path):
    with no_random_start():
        run = make_trainer(Accelerator(cpu=True), tmp_path / "run", METHODS[method])
        run.fit()
    assert_same(trained(results, "sharded", f"{method}/"), outcome(run))


@pytest.mark.faults(quick=True)
def test_sharded_run_resumes_bit_for_bit_and_on_one_process(results, folder, tmp_path):
    whole, resumed = trained(results, "sharded", "ham/"), trained(results, "sharded", "resumed/")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    shutil.copytree(folder / "sharded/stopped/checkpoint-4", tmp_path / "run/checkpoint-4")
    with no_random_start():
        run = make_trainer(Accelerator(cpu=True), tmp_path / "run", METHODS["ham"], resume_from_checkpoint="latest")
        run.resume()
        assert run.progress.step == 4
        run.fit()
    assert_same(outcome(run), whole)


@pytest.mark.faults(quick=True)
def test_run_goes_on_with_other_numbers_of_processes(results, folder, tmp_path):
    """2 -> 1 -> 4 processes, each time in mid-epoch: each example once per epoch, the same updates and weights."""
    with no_random_start():
        run = make_trainer(Accelerator(cpu=True), tmp_path / "run", RELAY_METHOD)
        run.fit()
    assert_same(trained(results, "four", ""), outcome(run))
    seen, start = {}, 0
    for world, stop in RELAY.items():
        for rank in range(world):
            leg = json.loads((folder / f"relay/seen-{world}-{rank}.json").read_text())
            assert leg["first"] == start
            assert leg["accumulation"] * world * 4 == 16
            assert len(leg["indices"]) == (stop - start) * leg["accumulation"]
            for number, indices in enumerate(leg["indices"]):
                seen.setdefault(start + number // leg["accumulation"], []).extend(indices)
        start = stop
    whole = run.data.train.seen
    for step in range(6):
        assert sorted(seen[step]) == sorted(whole[2 * step] + whole[2 * step + 1])
    for epoch in range(2):
        assert sorted(index for step in range(3) for index in seen[3 * epoch + step]) == list(range(48))
    rates, expected = (
        [record["learning_rate"] for record in log_of(where) if record["type"] == "train"]
        for where in (folder / "relay", tmp_path / "run")
    )
    assert rates == expected


def test_processes_that_do_not_know_of_each_other_are_refused(subprocess_env):
    # What `torchrun` on a CPU machine does without ACCELERATE_USE_CPU, as far as one process can tell.
    code = (
        "from accelerate import PartialState\n"
        "import os\n"
        "PartialState(cpu=True)\n"
        "os.environ |= {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}\n"
        "from ham_hf.training.launch import create_accelerator\n"
        "create_accelerator(use_cpu=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True, timeout=99)
    assert done.returncode != 0
    assert "started 2 processes, but accelerate sees 1" in done.stderr
