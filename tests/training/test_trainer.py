"""The loop: order of examples, logs, validation and selection, checkpoints, resuming bit for bit, passes counted."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.evaluation import Workplace, evaluate, standard_attacks
from ham_hf.methods import HAM, PGDAT
from ham_hf.metrics import ClassAccuracy
from ham_hf.training.checkpoint import list_checkpoints, load_best
from ham_hf.training.data_order import epoch_order
from ham_hf.training.log import RunLog, end_training, start_trackers
from ham_hf.training.resume import check_same_run
from ham_hf.training.stopping import TrainingStopped
from ham_hf.training.train_step import NonFiniteLossError, PassCounter
from ham_hf.training.validation import HeldOutAccuracy
from tests.benchmarks.yardsticks import PassCounter as Yardstick
from tests.faults.same_runs import FINAL, assert_same_weights, timeless_log
from tests.support.checkpoints import FILES
from tests.support.training import ATTACK, cut_off, image_data, log_of, make_net, resumed, trainer


class Untouchable:
    """A test split: training never looks at it."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split was asked for {name}")

    __len__ = None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run: 3 epochs of 6 updates, the first epoch without mining."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    run = trainer(folder, data=replace(image_data(), test=Untouchable()))
    return folder, run.fit(), run


def test_log_says_what_happened(finished):
    folder, progress, _ = finished
    log = log_of(folder)
    train = [record for record in log if record["type"] == "train"]
    assert [record["step"] for record in train] == list(range(2, 19, 2))
    assert [record["hard_fraction"] is None for record in train] == [True] * 3 + [False] * 6
    assert train[-1]["learning_rate"] < train[0]["learning_rate"]
    assert all(record["images_per_second"] > 0 for record in train)
    validation = [record for record in log if record["type"] == "validation"]
    assert [record["step"] for record in validation] == [6, 12, 18]
    assert [record["epoch"] for record in validation] == [0, 1, 2]
    assert validation[0]["hard_per_class"] is None
    assert len(validation[1]["hard_per_class"]) == 4
    for record in validation:
        assert len(record["clean_per_class"]) == len(record["robust_per_class"]) == 4
        assert record["worst_class"] == min(record["robust_per_class"])
        assert record["robust_accuracy"] <= record["clean_accuracy"]
    assert progress.step == 18
    assert len(progress.history) == 3


def test_training_learns_robustly(tmp_path):
    run = trainer(tmp_path / "run", num_train_epochs=20, ema_decay=None, save_steps=None)
    untrained = run._held_out(run.module).robust
    last = run.fit().history[-1]
    assert untrained.average <= 0.3
    assert last["clean_accuracy"] > 0.8
    assert last["robust_accuracy"] > 0.6


def test_checkpoints_are_named_by_step_and_hold_no_pickled_weights(finished):
    folder, _, _ = finished
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{n}" for n in (4, 8, 12, 16, 18)]
    assert {path.name for path in (folder / "checkpoint-8").iterdir()} == set(FILES)
    assert not (folder / "checkpoint-4" / "best.safetensors").exists()  # before the first validation


@pytest.mark.parametrize("cut_at", [4, 8, 12, 16])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, tmp_path, cut_at):
    full, progress, _ = finished
    folder = cut_off(full, tmp_path / "cut", cut_at)
    run = resumed(folder)
    assert run.progress.step == cut_at
    again = run.fit()
    assert_same_weights(folder, full, *FINAL)
    assert again.history == progress.history
    assert again.best == progress.best
    assert again.passes == progress.passes
    assert timeless_log(folder) == timeless_log(full)


def test_selected_weights_are_those_of_the_best_validation(finished):
    folder, progress, run = finished
    weights, state = load_best(folder)
    scores = [record["robust_accuracy"] for record in progress.history]
    assert state["score"] == max(scores)
    assert state["step"] == max(r["step"] for r in progress.history if r["robust_accuracy"] == max(scores))
    if state["step"] == progress.step:
        assert all(torch.equal(weights[key], value) for key, value in run.average.module.state_dict().items())


@pytest.mark.parametrize("metric", ["robust_accuracy", "worst_class", "robust_plus_worst", "verdict", "last"])
def test_selection_metric(tmp_path, monkeypatch, metric):
    run = trainer(tmp_path / "run", data=image_data(26), selection_metric=metric, save_steps=None)
    numbers = iter([(0.5, 0.1, 0.2), (0.4, 0.3, 0.25), (0.45, 0.2, 0.3)])
    per_class = [ClassAccuracy(count=16, correct=8, accuracy=0.5, low=0.2, high=0.8)] * 4

    def summary(average, worst):
        return SimpleNamespace(average=average, worst_class=worst, per_class=per_class)

    def held_out(module):
        average, worst, verdict = next(numbers)
        robust, verdict = summary(average, worst), summary(verdict, 0.1)
        return HeldOutAccuracy(clean=summary(0.9, 0.8), robust=robust, verdict=verdict)

    monkeypatch.setattr(run, "_held_out", held_out)
    best = run.fit().best
    epochs = {"robust_accuracy": 0, "worst_class": 1, "robust_plus_worst": 1, "verdict": 2, "last": 2}
    assert best["epoch"] == epochs[metric]
    assert load_best(tmp_path / "run")[1] == best


def test_the_held_out_verdict_is_that_of_both_attacks_on_the_selected_weights(tmp_path):
    run = trainer(tmp_path / "run", selection_metric="verdict", num_train_epochs=2)
    progress = run.fit()
    weights, best = load_best(tmp_path / "run")
    scores = [record["verdict"] for record in progress.history]
    assert best["metric"] == "verdict"
    assert best["score"] == max(scores)
    module = nn.Module.state_dict(run.selected_module)
    assert module.keys() == weights.keys()
    run.selected_module.load_state_dict(weights)
    validation = run.data.validation
    results = evaluate(
        run.selected_module,
        validation,
        standard_attacks(replace(ATTACK, num_steps=run.config.validation_num_steps)),
        Workplace(accelerator=run.accelerator, batch_size=run.eval_batch_size, seed=run.config.seed),
    )
    right = torch.stack([result.flags for result in results.values()]).all(0)
    record = next(record for record in progress.history if record["step"] == best["step"])
    assert record["verdict"] == pytest.approx(float(right.double().mean()))
    assert record["verdict"] <= record["robust_accuracy"]
    assert record["verdict_worst_class"] == min(record["verdict_per_class"])
    assert "verdict" not in trainer(tmp_path / "other", num_train_epochs=1).fit().history[0]


def test_without_a_held_out_part_the_last_weights_are_taken(tmp_path):
    run = trainer(tmp_path / "run", data=image_data(validation=False), selection_metric="last", num_train_epochs=2)
    progress = run.fit()
    assert progress.best["step"] == 12
    assert "robust_accuracy" not in progress.history[0]


def requests_of(run, epoch):
    return run.layout.requests(epoch_order(run.data.train.labels, run.config.seed, epoch), epoch)


def test_every_example_is_seen_at_most_once_per_epoch_in_an_order_of_its_own(tmp_path):
    run = trainer(tmp_path / "run")
    epochs = [torch.cat([request.indices for request in requests_of(run, epoch)]) for epoch in (0, 1)]
    for order in epochs:
        assert len(order) == 48
        assert len(order.unique()) == 48
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], torch.cat([r.indices for r in requests_of(trainer(tmp_path / "other"), 0)]))
    seeds = [request.seed for epoch in (0, 1) for request in requests_of(run, epoch)]
    assert len(set(seeds)) == len(seeds)


def test_updates_that_nobody_needs_are_skipped_and_counted(tmp_path):
    # After enough warm-up nothing is misclassified under a zero perturbation any more.
    settings = {"num_train_epochs": 14, "learning_rate": 0.2, "ema_decay": None, "save_steps": None}
    still = Attack(threat_model=ThreatModel("linf", 0.0), num_steps=1, step_size=0.01)
    data, ham = image_data(validation=False), HAM(mining_start_epoch=10, mining_step=0)
    progress = trainer(tmp_path / "run", ham, data, attack=still, selection_metric="last", **settings).fit()
    assert progress.skipped_updates > 0
    assert progress.step == 14 * 6
    skipped = [record["skipped_updates"] for record in log_of(tmp_path / "run") if record["type"] == "train"]
    assert skipped[-1] == progress.skipped_updates


@pytest.mark.faults(quick=True)
def test_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    run = trainer(tmp_path / "run", learning_rate=1e30, lr_scheduler_type="constant", save_steps=1, ema_decay=None)
    with pytest.raises(NonFiniteLossError, match="--learning_rate"):
        run.fit()
    last = list_checkpoints(tmp_path / "run")[-1]
    assert last.name == f"checkpoint-{run.progress.step}"
    assert run.progress.step >= 1


OTHERS = [
    ({"seed": 3}, r"seed 0 -> 3"),
    ({"ema_decay": None}, "ema_decay 0.9 -> None"),
    ({"learning_rate": 0.2, "weight_decay": 0.1}, "learning_rate 0.1 -> 0.2; weight_decay 0.0005 -> 0.1"),
    ({"optimizer": "adamw"}, r"optimizer momentum -> adamw"),
    ({"resume_from_checkpoint": "nowhere/checkpoint-3"}, "there is no such folder; expected latest or"),
    # Rates of no single command: 2 epochs of a cosine, then the last 2 of one of 4.
    ({"num_train_epochs": 4}, "num_train_epochs 3 -> 4; --lr_scheduler_type cosine ends with the last epoch"),
    ({"data": image_data(46)}, r"num_train_examples 50 -> 46"),
    ({"data": replace(image_data(), image_size=16)}, "image_size 8 -> 16"),
    ({"data": replace(image_data(), revision="b" * 40)}, "dataset .*None.* -> .*bbbb"),
    ({"method": HAM(mining_start_epoch=1, mining_step=2)}, r"ham.mining_step 1 -> 2"),
    ({"method": PGDAT()}, "method ham -> pgd_at"),
    ({"attack": replace(ATTACK, threat_model=ThreatModel("linf", 0.06))}, r"epsilon 0.05 -> 0.06"),
    ({"net": nn.Sequential(*make_net()[:-1], nn.Linear(8, 4, bias=False))}, "parameter_shapes"),
    ({"more": {"plan_besides": {"model_args": {"drop_path_rate": 0.1}}}}, "model_args None -> .*drop_path_rate"),
]


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize(("other", "message"), OTHERS, ids=[message[:30] for _, message in OTHERS])
def test_checkpoint_of_another_run_is_refused(finished, other, message):
    with pytest.raises(ValueError, match=message):
        resumed(finished[0], **other)


def test_resuming_an_older_checkpoint_forgets_what_came_after_it(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    run = resumed(folder, resume_from_checkpoint=str(folder / "checkpoint-8"), max_steps=10, save_total_limit=1)
    progress = run.fit()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-10"]
    assert load_best(folder)[1] == progress.best
    assert progress.best["step"] in (6, 10)


def test_resuming_elsewhere_takes_the_best_weights_along(finished, tmp_path):
    source = finished[0] / "checkpoint-18"
    run = resumed(tmp_path / "elsewhere", resume_from_checkpoint=str(source))
    progress = run.fit()
    assert progress.step == 18
    assert load_best(tmp_path / "elsewhere")[1] == progress.best == finished[1].best


def test_max_steps_ends_in_mid_epoch_and_a_longer_run_keeps_the_counts(finished, tmp_path):
    folder = tmp_path / "run"
    progress = trainer(folder, max_steps=8, save_steps=None).fit()
    assert progress.step == 8
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6", "checkpoint-8"]
    assert [record["step"] for record in progress.history] == [6, 8]
    run = resumed(folder)
    whole = {record["step"]: record["hard_per_class"] for record in finished[1].history}
    again = {record["step"]: record["hard_per_class"] for record in run.fit().history}
    assert again[12] == whole[12]
    assert again[18] == whole[18]


@pytest.mark.parametrize("stopped_at", [3, 8])
def test_a_total_that_is_reached_already_ends_with_a_validation(tmp_path, stopped_at):
    run = trainer(tmp_path / "run", selection_metric="last")
    with pytest.raises(TrainingStopped):
        run.fit(lambda: "a request" if run.progress.step == stopped_at - 1 else None)
    progress = resumed(tmp_path / "run", selection_metric="last", max_steps=stopped_at - 1, save_steps=100).fit()
    assert progress.history[-1]["step"] == progress.step == load_best(tmp_path / "run")[1]["step"] == stopped_at
    # It is kept: the same command again finds nothing to do.
    resumed(tmp_path / "run", selection_metric="last", max_steps=stopped_at - 1, save_steps=100).fit()
    validated = [line["step"] for line in log_of(tmp_path / "run") if line["type"] == "validation"]
    assert validated.count(stopped_at) == 1


def test_hard_fraction_is_of_its_own_epoch(finished):
    log = log_of(finished[0])
    for epoch in (1, 2):
        (validation,) = (r for r in log if r["type"] == "validation" and r["epoch"] == epoch)
        lines = [r["hard_fraction"] for r in log if r["type"] == "train" and r["epoch"] == epoch]
        assert validation["hard_fraction"] == pytest.approx(sum(lines) / 3)


def test_speed_leaves_out_validation_and_saving(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", num_train_epochs=1, save_steps=1)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def taking(seconds, action):
        def timed(*args, **kwargs):
            clock[0] += seconds
            return action(*args, **kwargs)

        return timed

    monkeypatch.setattr(run, "train_step", taking(1, run.train_step), raising=True)
    monkeypatch.setattr(run, "_held_out", taking(100, run._held_out))
    monkeypatch.setattr(run, "_save", taking(1000, run._save))
    progress = run.fit()
    assert progress.seconds == 6 + 100
    rates = [record["images_per_second"] for record in log_of(tmp_path / "run") if record["type"] == "train"]
    assert rates == [8.0, 8.0, 8.0]


def test_averaged_weights_follow_the_updates(tmp_path):
    run = trainer(tmp_path / "run", max_steps=3, ema_decay=0.9)
    average = {}
    update = run.train_step.__class__.__call__

    def spy(self, *args, **kwargs):
        totals = update(self, *args, **kwargs)
        for key, value in self.module.state_dict().items():
            # The first update starts the average.
            follows = key in average and value.is_floating_point()
            average[key] = 0.9 * average[key] + 0.1 * value if follows else value.clone()
        return totals

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.train_step.__class__, "__call__", spy)
        run.fit()
    for key, value in run.average.module.state_dict().items():
        torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-6)
    weights, _ = load_best(tmp_path / "run")
    assert all(torch.equal(weights[key], value) for key, value in run.average.module.state_dict().items())


def test_what_goes_wrong_after_a_save_does_not_stop_training(tmp_path, caplog):
    seen = []

    def broken(run):
        seen.append((run.progress.step, len(run.selected_weights())))
        raise RuntimeError("the line is down")

    run = trainer(tmp_path / "run", max_steps=8, save_steps=4, more={"after_save": broken})
    assert run.fit().step == 8
    count = len(run.module.state_dict())
    assert seen == [(4, count), (8, count)]  # 4 is before the first validation: current weights
    assert "the line is down" in caplog.text


@pytest.mark.faults(quick=True)
def test_a_tracker_that_fails_stops_no_training(tmp_path, caplog, monkeypatch):
    run = trainer(tmp_path / "run", max_steps=4)

    def full(values, step):
        raise OSError("No space left on device")

    monkeypatch.setattr(run.accelerator, "log", full)
    assert run.fit().step == 4
    assert "the tracker failed on the numbers of update 2" in caplog.text
    assert [record["step"] for record in log_of(tmp_path / "run")] == [2, 4, 4]


@pytest.mark.faults(quick=True)
def test_a_tracker_that_cannot_begin_is_refused_and_one_that_cannot_end_is_only_said(tmp_path, caplog, monkeypatch):
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = ["wandb"]

    def nobody(*_, **__):
        raise RuntimeError("no API key configured")

    monkeypatch.setattr(accelerator, "init_trackers", nobody)
    with pytest.raises(ValueError, match=r"--report_to wandb could not begin: no API key .*--report_to none"):
        start_trackers(accelerator, tmp_path, {"project": "p", "run_name": None, "trackio_space_id": None}, step=0)
    monkeypatch.setattr(accelerator, "end_training", nobody)
    end_training(accelerator)
    assert "the tracker failed while closing" in caplog.text


@pytest.mark.faults(quick=True)
def test_lines_that_wait_are_written_before_a_run_stops(finished, tmp_path, monkeypatch):
    """The disk has room again between the line of update 4 and the stop after update 5, which makes no line."""
    folder = tmp_path / "run"
    run = trainer(folder)
    append, full = RunLog._append, [True]

    def no_room(log, text):
        if full[0]:
            raise OSError("No space left on device")
        append(log, text)

    monkeypatch.setattr(RunLog, "_append", no_room)
    with pytest.raises(TrainingStopped):
        run.fit(lambda: full.clear() or full.append(False) or "a request" if run.progress.step == 4 else None)
    assert [record["step"] for record in log_of(folder)] == [2, 4]


@pytest.mark.faults(quick=True)
def test_a_run_that_streamed_goes_on_streaming(finished):
    folder, progress, _ = finished
    streamed = progress.plan | {"stream": {"lanes": 8}}
    with pytest.raises(ValueError, match=r"other settings: stream \{'lanes': 8\} -> None"):
        check_same_run(folder, saved=streamed, plan=progress.plan)
    with pytest.raises(ValueError, match=r"other settings: stream None -> \{'lanes': 8\}"):
        check_same_run(folder, saved=progress.plan, plan=streamed)
    check_same_run(folder, saved=streamed, plan=streamed)


def test_max_steps_before_mining_is_said(tmp_path, caplog):
    trainer(tmp_path / "run", max_steps=6)
    assert "ham starts at epoch 2 (--mining_start_epoch 1), and --max_steps 6 ends the run in epoch 1" in caplog.text
    caplog.clear()
    trainer(tmp_path / "run", max_steps=7)
    assert "--max_steps" not in caplog.text
    trainer(tmp_path / "run", max_steps=7, awp_gamma=0.01, awp_start_epoch=2)
    assert "awp starts at epoch 3 (--awp_start_epoch 2), and --max_steps 7 ends the run in epoch 2" in caplog.text


def test_too_few_examples_for_one_update(tmp_path):
    message = r"50 examples, fewer than the 64 of one update.*--per_device_train_batch_size"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", per_device_train_batch_size=64)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_training_equals_eager_training(tmp_path):
    weights = []
    for compiled in (False, True):
        settings = {"torch_compile": compiled, "max_steps": 8, "ema_decay": None}
        # Compiled dropout draws other numbers.
        trainer(tmp_path / str(compiled), net=make_net(dropout=0.0), **settings).fit()
        weights.append(load_file(tmp_path / str(compiled) / "checkpoint-8" / "model.safetensors"))
    eager, fast = weights
    assert eager.keys() == fast.keys()
    for name in eager:
        torch.testing.assert_close(fast[name], eager[name], rtol=1e-3, atol=1e-4)


def test_bf16_keeps_pixels_and_weights_in_float32(tmp_path, request):
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    request.addfinalizer(AcceleratorState._reset_state)
    seen = []
    net = make_net()
    net[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    settings = {"mixed_precision": "bf16", "num_train_epochs": 1}
    run = trainer(tmp_path / "run", PGDAT(), net=net, accelerator=accelerator, **settings)
    progress = run.fit()
    assert (torch.float32, torch.bfloat16) in seen
    assert all(value.dtype != torch.bfloat16 for value in run.module.state_dict().values())
    assert progress.history[-1]["clean_accuracy"] > 0.2


@pytest.mark.parametrize("schedule", ["piecewise", "constant"])
def test_a_longer_run_of_a_schedule_without_an_end_is_the_direct_one_and_says_what_was_changed(
    schedule, tmp_path, caplog
):
    settings = {"lr_scheduler_type": schedule}
    trainer(tmp_path / "run", num_train_epochs=1, **settings).fit()
    longer = resumed(tmp_path / "run", num_train_epochs=2, **settings)
    progress = longer.fit()
    direct = trainer(tmp_path / "direct", num_train_epochs=2, **settings)
    direct.fit()
    for name, value in direct.module.state_dict().items():
        assert torch.equal(longer.module.state_dict()[name], value)
    changed = "--num_train_epochs 2 instead of 1"
    assert progress.changes == [f"After update 6, from epoch 2 on, the run had {changed}."]
    assert f"the run continues with {changed}: the card will say so" in caplog.text
    assert direct.progress.changes == []
    again = resumed(tmp_path / "run", num_train_epochs=2, **settings)
    assert again.progress.changes == progress.changes, "said once, and kept"


def test_settings_that_change_when_training_is_complete_train_nothing(finished, tmp_path, caplog):
    folder, _, run = finished
    shutil.copytree(folder, tmp_path / "run")
    again = resumed(tmp_path / "run", max_steps=run.total_steps)
    (sentence,) = again.progress.changes
    again_with = f"After update {run.total_steps}, the last, the run was started again with --max_steps "
    assert sentence.startswith(again_with)
    assert sentence.endswith(", without further training.")
    assert again.progress.changeable == run.progress.changeable, "what it was trained with"
    assert "the card will say so" in caplog.text


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 3}, {"awp_gamma": 0.01}], ids=str)
def test_forwards_and_gradients_of_a_whole_run_are_counted(tmp_path, changes):
    run = trainer(tmp_path, ema_decay=None, num_train_epochs=2, **changes)
    yardstick = Yardstick(run.module)
    progress = run.fit()
    yardstick.close()
    assert progress.passes == yardstick.passes(1) > 0


def test_pgd_adversarial_training_costs_what_its_formula_says(tmp_path):
    settings = {"ema_decay": None, "selection_metric": "last"}
    progress = trainer(tmp_path, PGDAT(), data=image_data(validation=False), **settings).fit()
    images = 3 * 6 * 8  # epochs, updates, batch
    assert progress.passes == images * (2 * ATTACK.num_steps + 3)
    assert {line["passes_per_image"] for line in log_of(tmp_path)[:3]} == {2 * ATTACK.num_steps + 3.0}


def test_the_average_of_weights_that_is_validated_counts_too(tmp_path):
    progress = trainer(tmp_path, PGDAT(), ema_decay=0.9).fit()
    updates = 3 * 6 * 8 * (2 * ATTACK.num_steps + 3)
    # Each of three validations classifies all 64 held-out images and attacks at least one.
    assert progress.passes > updates + 3 * 64


def test_a_copy_of_the_network_does_not_count():
    net, counter = make_net(), PassCounter()
    counter.watch(net)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        copy.deepcopy(net)(x)
        assert counter.take() == 0
        net(x)
    assert (counter.take(), counter.take()) == (4, 0)
