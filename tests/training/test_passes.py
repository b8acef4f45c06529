"""The price of a run: passes over the network, counted where they happen, against counts made from outside."""

from __future__ import annotations

import copy

import pytest
import torch

from ham_hf.methods import PGDAT
from ham_hf.training.stopping import TrainingStopped
from ham_hf.training.train_step import PassCounter
from tests.benchmarks.yardsticks import PassCounter as Yardstick
from tests.support.training import ATTACK, HAM_FROM_1, image_data, log_of, make_net, resumed, trainer


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 3}, {"awp_gamma": 0.01}], ids=str)
def test_forwards_and_gradients_of_a_whole_run_are_counted(tmp_path, changes):
    run = trainer(tmp_path, HAM_FROM_1, ema_decay=None, num_train_epochs=2, **changes)
    yardstick = Yardstick(run.module)
    progress = run.fit()
    yardstick.close()
    assert progress.passes == yardstick.passes(1) > 0


def test_pgd_adversarial_training_costs_what_its_formula_says(tmp_path):
    progress = trainer(
        tmp_path, PGDAT(), data=image_data(validation=False), ema_decay=None, selection_metric="last"
    ).fit()
    images = 3 * 6 * 8  # epochs, updates, batch
    assert progress.passes == images * (2 * ATTACK.num_steps + 3)
    assert {line["passes_per_image"] for line in log_of(tmp_path)[:3]} == {2 * ATTACK.num_steps + 3.0}


def test_the_average_of_weights_that_is_validated_counts_too(tmp_path):
    progress = trainer(tmp_path, PGDAT(), ema_decay=0.9).fit()
    updates = 3 * 6 * 8 * (2 * ATTACK.num_steps + 3)
    # Each of three validations classifies all 64 held-out images and attacks at least one.
    assert progress.passes > updates + 3 * 64


def test_a_resumed_run_has_counted_what_the_whole_one_did(tmp_path):
    whole = trainer(tmp_path / "whole").fit()
    stopped = trainer(tmp_path / "stopped")
    with pytest.raises(TrainingStopped):
        stopped.fit(lambda: "a test" if stopped.progress.step == 8 else None)
    again = resumed(tmp_path / "stopped")
    assert again.progress.step == 9
    assert again.fit().passes == whole.passes


def test_a_copy_of_the_network_does_not_count():
    net, counter = make_net(), PassCounter()
    counter.watch(net)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        copy.deepcopy(net)(x)
        assert counter.take() == 0
        net(x)
    assert (counter.take(), counter.take()) == (4, 0)
