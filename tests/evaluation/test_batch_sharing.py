"""Evaluation that is killed, or runs out of memory, ends with the numbers of the one that was not."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ham_hf.artifacts import PARTIAL_RESULTS
from ham_hf.attacks import Attack, ThreatModel
from ham_hf.evaluation import Workplace, evaluate, memory_layout, standard_attacks
from ham_hf.evaluation.autoattack import evaluate_autoattack
from ham_hf.evaluation.batch_sharing import remove_partial_results
from ham_hf.reporting.report import read_report
from tests.faults.same_runs import Program
from tests.support.nets import TensorImages, Watched, group_norm_net
from tests.support.recipe_runs import SMALL, finish, launch_command, recipe_module

pytestmark = [pytest.mark.slow, pytest.mark.faults(quick=True)]

# Some images fall and some do not, and which ones depends on the random starts.
THREAT = ThreatModel("linf", 0.05)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def split(num=88, seed=0):
    """Images of which an eighth is misclassified as it is."""
    net = group_norm_net().float()
    x = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = net(x).argmax(1)
    y[::8] = (y[::8] + 1) % 4
    return TensorImages(x, y)


def pgd_results(net, images, accelerator, folder=None, *, num_steps=1, batch_size=10, threat=THREAT, seed=4):
    attacks = standard_attacks(Attack(threat_model=threat, num_steps=num_steps, step_size=0.02))
    place = Workplace(accelerator=accelerator, batch_size=batch_size, seed=seed, output_dir=folder)
    return list(evaluate(net, images, attacks, place).values())


def auto_results(net, images, accelerator, folder=None, *, num_examples=None, batch_size=10, threat=THREAT, seed=4):
    place = Workplace(accelerator=accelerator, batch_size=batch_size, seed=seed, output_dir=folder)
    return [evaluate_autoattack(net, images, place, num_classes=4, threat_model=threat, num_examples=num_examples)]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.predictions, theirs.predictions)
        # In halves of a batch, logits are rounded in another way.
        torch.testing.assert_close(ours.margins, theirs.margins)
        assert torch.equal(ours.flags, theirs.flags)
        assert torch.equal(ours.indices, theirs.indices)
        assert ours.settings == theirs.settings


def differ(found, others):
    pairs = zip(found, others, strict=True)
    return any(not torch.equal(ours.predictions, theirs.predictions) for ours, theirs in pairs)


KINDS = pytest.mark.parametrize("run", [pgd_results, auto_results], ids=["pgd", "autoattack"])


@KINDS
def test_interrupted_evaluation_goes_on_where_it_stopped(run, accelerator, tmp_path, quick_autoattack, caplog):
    images = split()
    whole = Watched(group_norm_net().float())
    expected = run(whole, images, accelerator)
    assert 0 < expected[-1].flags.sum() < expected[0].labels.numel() * 7 // 8
    assert differ(expected, run(group_norm_net().float(), images, accelerator, seed=5))
    broken = Watched(group_norm_net().float(), break_after=whole.passes * 2 // 3)
    with pytest.raises(KeyboardInterrupt):
        run(broken, images, accelerator, tmp_path)
    kept = list((tmp_path / PARTIAL_RESULTS).rglob("*.json"))
    assert kept
    caplog.set_level(logging.INFO)
    rest = Watched(group_norm_net().float())
    found = run(rest, images, accelerator, tmp_path)
    assert_same(found, expected)
    assert "batches are kept from an interrupted run" in caplog.text
    assert rest.passes < whole.passes * 2 / 3
    # Finished, it is all there: nothing is attacked again.
    again = Watched(group_norm_net().float())
    assert_same(run(again, images, accelerator, tmp_path), expected)
    assert again.passes == 0
    remove_partial_results(tmp_path)
    assert list(tmp_path.iterdir()) == []


@KINDS
@pytest.mark.parametrize(
    "change", ["weights", "network", "pixels", "labels", "epsilon", "seed", "batch_size", "attack", "damaged file"]
)
def test_results_of_something_else_are_never_used(run, change, accelerator, tmp_path, quick_autoattack):
    net, images = group_norm_net().float(), split()
    threat, attack = ThreatModel("linf", 0.051), {"num_steps": 2} if run is pgd_results else {"num_examples": 30}
    changed = {"epsilon": {"threat": threat}, "seed": {"seed": 5}, "batch_size": {"batch_size": 11}, "attack": attack}
    options = changed.get(change, {})
    run(net, images, accelerator, tmp_path)
    if change == "weights":
        with torch.no_grad():
            next(net.parameters())[0, 0, 0, 0] += 1e-3
    elif change == "network":
        net[2] = nn.GELU()
    elif change == "pixels":
        images.x[0] = 1 - images.x[0]
    elif change == "labels":
        images.labels[-1] = (images.labels[-1] + 1) % 4
    elif change == "damaged file":
        for path in (tmp_path / PARTIAL_RESULTS).rglob("*.json"):
            path.write_text(path.read_text()[: -len("}")])
    watched = Watched(net)
    assert_same(run(watched, images, accelerator, tmp_path, **options), run(net, images, accelerator, **options))
    fresh = Watched(net)
    run(fresh, images, accelerator, **options)
    assert watched.passes == fresh.passes


def test_time_of_earlier_parts_counts(accelerator, tmp_path):
    net, images = group_norm_net().float(), split()
    first = pgd_results(net, images, accelerator, tmp_path)
    again = pgd_results(net, images, accelerator, tmp_path)
    assert [ours.seconds for ours in again] == pytest.approx([ours.seconds for ours in first])
    path = sorted((tmp_path / PARTIAL_RESULTS).rglob("*.json"))[0]
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"seconds": [100.0, 200.0, 300.0]}))
    slower = pgd_results(net, images, accelerator, tmp_path)
    assert [round(ours.seconds, -2) for ours in slower] == [100, 200, 300]


def test_disk_that_takes_nothing_does_not_stop_the_evaluation(accelerator, tmp_path, caplog):
    net, images = group_norm_net().float(), split()
    (tmp_path / PARTIAL_RESULTS).write_text("a file where the folder should be")
    found = pgd_results(net, images, accelerator, tmp_path)
    assert_same(found, pgd_results(net, images, accelerator))
    assert "cannot be written" in caplog.text


@KINDS
@pytest.mark.parametrize("limits", [{"limit": 7}, {"limit": 3, "limit_always": 6}, {"limit": 1, "limit_always": 1}])
def test_out_of_memory_halves_the_batch_and_changes_nothing(run, limits, accelerator, quick_autoattack, caplog):
    images = split()
    expected = run(group_norm_net().float(), images, accelerator)
    assert differ(expected, run(group_norm_net().float(), images, accelerator, seed=5))
    found = run(Watched(group_norm_net().float(), **limits), images, accelerator)
    assert_same(found, expected)
    assert "out of memory with" in caplog.text
    assert "--per_device_eval_batch_size" in caplog.text


@KINDS
def test_single_image_that_does_not_fit_is_an_error(run, accelerator, quick_autoattack):
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run(Watched(group_norm_net().float(), limit=0, limit_always=0), split(), accelerator)


def test_memory_layout_of_images_is_that_of_the_weights(accelerator):
    images, seen = split(), set()
    plain, last = (group_norm_net().double() for _ in range(2))
    last = last.to(memory_format=torch.channels_last)
    assert (memory_layout(plain), memory_layout(last)) == (torch.contiguous_format, torch.channels_last)
    assert memory_layout(nn.Linear(3, 2)) == torch.contiguous_format
    images.x = images.x.double()
    expected = pgd_results(plain, images, accelerator)
    last.register_forward_pre_hook(
        lambda _, x: seen.add(x[0].is_contiguous(memory_format=torch.channels_last)) if x[0].requires_grad else None
    )
    assert_same(pgd_results(last, images, accelerator), expected)
    assert seen == {True}


# So large an epsilon that all images fall to the first attack: none is left for the slow ones.
EVALUATE = ["--dataset_name=digits", "--use_cpu", "--limit_test_examples=120", "--eval_num_steps=2", "--epsilon=0.4"]
EVALUATE += ["--per_device_eval_batch_size=6", "--autoattack"]


@pytest.mark.faults(quick=True)
def test_evaluate_killed_in_autoattack_goes_on_with_the_same_command(tmp_path, subprocess_env, capsys, caplog):
    model, folder, whole = tmp_path / "model", tmp_path / "evaluation", tmp_path / "whole"
    recipe_module("train_ham.py").main(
        [*SMALL, f"--output_dir={model}", "--per_device_train_batch_size=16", "--num_train_epochs=1"]
    )
    evaluate_main = recipe_module("evaluate.py").main
    evaluate_main([str(model), *EVALUATE, f"--output_dir={whole}"])
    command = [str(model), *EVALUATE, f"--output_dir={folder}"]
    kill_when_kept(launch_command("evaluate.py", *command), folder, "autoattack-apgd-ce", subprocess_env)
    assert not (folder / "report.json").exists()
    caplog.set_level(logging.INFO)
    evaluate_main(command)
    assert "batches are kept from an interrupted run" in caplog.text
    ours, theirs = (read_report(path / "report.json") for path in (folder, whole))
    assert list(ours.results) == ["clean", "pgd-2", "cw-2", "autoattack"]
    for name, result in ours.results.items():
        assert result.summary == theirs.results[name].summary
        assert result.confusion == theirs.results[name].confusion
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    with pytest.raises(SystemExit):
        evaluate_main(command)
    assert "already holds files" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2)])
def test_training_killed_in_its_evaluation_goes_on_with_it(before, after, tmp_path, subprocess_env):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    options = [*SMALL, "--autoattack", "--per_device_eval_batch_size=4", "--epsilon=0.4"]
    options += ["--limit_test_examples=200"]
    batch = {1: "--per_device_train_batch_size=16", 2: "--per_device_train_batch_size=8"}
    run = launch_command("train_ham.py", *options, batch[before], f"--output_dir={whole}", processes=before)
    finish(run, subprocess_env)
    run = launch_command("train_ham.py", *options, batch[before], f"--output_dir={folder}", processes=before)
    kill_when_kept(run, folder, "autoattack-apgd-ce", subprocess_env)
    assert not (folder / "report.json").exists()
    resumed = [*options, batch[after], f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
    done = finish(launch_command("train_ham.py", *resumed, processes=after), subprocess_env)
    assert "batches are kept from an interrupted run" in done.stderr
    ours, theirs = (read_report(path / "report.json") for path in (folder, whole))
    for name, result in ours.results.items():
        assert result.summary == theirs.results[name].summary
    assert not (folder / PARTIAL_RESULTS).exists()


def kill_when_kept(command, folder, stage, env):
    """Start a run and end it with SIGKILL as soon as it has finished a batch of a stage."""
    run = Program(command, env)
    deadline = time.monotonic() + 400
    while not list((folder / PARTIAL_RESULTS).glob(f"*/{stage}-*.json")) and time.monotonic() < deadline:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    run.kill()
    assert list((folder / PARTIAL_RESULTS).glob(f"*/{stage}-*.json"))
