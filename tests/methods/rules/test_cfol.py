"""CFOL: log-weights, probabilities and weights against the authors' numbers; classes without training images."""

from __future__ import annotations

import pytest
import torch

from ham_hf.methods import HAM, BaseLoss, TradesLoss, TrainingRows
from ham_hf.methods.rules.cfol import CFOL, CFOLRule
from tests.support.golden_data import exact, golden_tensors
from tests.support.method_checks import attack_of, initial_states

TENSORS, HYPER = golden_tensors("cfol")
OPTIONS = {"cfol_gamma": HYPER["gamma"], "cfol_eta": HYPER["eta"]}
COUNTS = TENSORS["in/dataset_targets"].bincount(minlength=10).double()
ATTACK = attack_of({"epsilon": 0.024, "step_size": 0.0022, "num_steps": 3})


def observed(cfol, y, wrong):
    """The method's observation of rows with these labels, of which some are misclassified."""
    logits = torch.nn.functional.one_hot((y + wrong) % 10, 10).double()
    return cfol.rule.observe(logits, y, epoch=0)


@pytest.mark.parametrize("base", ["uniform", "empirical"])
def test_sampler_is_the_authors_where_probabilities_change_after_every_batch(base):
    cfol = CFOL(cfol_base=base, **OPTIONS)
    state = cfol.rule.initial_state(COUNTS)
    expected = {name: TENSORS[f"out/{base}_sample/{name}"] for name in ("w", "p", "q")}
    for number, (y, wrong) in enumerate(zip(TENSORS["in/batch_y"], TENSORS["in/batch_wrong"], strict=True)):
        exact(state["log_weight"], expected["w"][number])
        exact(state["log_weight"].softmax(0), expected["q"][number])
        exact(cfol.rule.class_probabilities(state), expected["p"][number])
        assert cfol.rule.class_weight(state, BaseLoss(), epoch=0) is None
        cfol.rule.after_update(state, observed(cfol, y, wrong), epoch=0)
        # Ours change with the epoch: here every batch is one.
        cfol.rule.before_epoch(state, epoch=number + 1)
    exact(state["log_weight"], expected["w"][6])
    exact(cfol.rule.class_probabilities(state), expected["p"][6])


def test_sampler_is_frozen_for_an_epoch_where_the_authors_go_on():
    cfol = CFOL(**OPTIONS)
    state = cfol.rule.initial_state(COUNTS)
    for y, wrong in zip(TENSORS["in/batch_y"], TENSORS["in/batch_wrong"], strict=True):
        cfol.rule.after_update(state, observed(cfol, y, wrong), epoch=0)
        assert cfol.rule.class_probabilities(state).tolist() == pytest.approx([0.1] * 10)
    total = torch.zeros(10, dtype=torch.float64)
    for label, wrong in zip(TENSORS["in/batch_y"].flatten(), TENSORS["in/batch_wrong"].flatten(), strict=True):
        total[label] += HYPER["eta"] * int(wrong) / 0.1
    exact(state["log_weight"], total)
    cfol.rule.before_epoch(state, epoch=1)
    exact(cfol.rule.class_probabilities(state), 0.05 + 0.5 * total.softmax(0))
    assert not torch.allclose(total, TENSORS["out/uniform_sample/w"][6])


@pytest.mark.parametrize("base", ["uniform", "empirical"])
def test_weights_divide_by_the_base_and_are_the_authors(base):
    cfol = CFOL(cfol_as="weight", cfol_base=base, **OPTIONS)
    state = cfol.rule.initial_state(COUNTS)
    assert cfol.rule.class_probabilities(state) is None
    batches = zip(TENSORS["in/batch_y"], TENSORS["in/batch_wrong"], TENSORS["in/batch_loss"], strict=True)
    for number, (y, wrong, terms) in enumerate(batches):
        exact(state["log_weight"], TENSORS[f"out/{base}_reweight/w"][number])
        batch = TrainingRows(x=torch.zeros(32, 1, 1, 1), y=y, weight=torch.ones(32, dtype=torch.float64))
        weight, divisor = cfol.weigh(batch, epoch=0, states={"cfol": state})
        exact(weight[0] / 10, TENSORS[f"out/{base}_reweight/batch_weight"][number])
        exact((weight[0] * terms).sum() / divisor[0], TENSORS[f"out/{base}_reweight/weighted_loss_mean"][number])
        cfol.rule.after_update(state, observed(cfol, y, wrong), epoch=0)
    exact(state["log_weight"], TENSORS[f"out/{base}_reweight/w"][6])
    exact(state["base"], TENSORS[f"out/{base}_reweight/p"][6])


@pytest.mark.parametrize("base", ["uniform", "empirical"])
@pytest.mark.parametrize("num_classes", [3, 100])
def test_classes_without_training_images_are_never_drawn(base, num_classes):
    counts = torch.arange(num_classes, dtype=torch.float64)
    present = counts > 0
    for kind in ("sampler", "weight"):
        cfol = CFOL(cfol_as=kind, cfol_base=base, cfol_eta=0.5)
        state = cfol.rule.initial_state(counts)
        y = torch.arange(1, num_classes)
        for epoch in range(4):
            cfol.rule.before_epoch(state, epoch=epoch)
            wrong = torch.nn.functional.one_hot(torch.zeros_like(y), num_classes).double()
            cfol.rule.after_update(state, cfol.rule.observe(wrong, y, epoch=epoch), epoch=epoch)
            cfol.rule.after_update(state, cfol.rule.observe(wrong[:0], y[:0], epoch=epoch), epoch=epoch)
        assert all(torch.isfinite(value).all() for value in state.values())
        assert float(state["log_weight"][0]) == 0
        assert (state["log_weight"][1:] > 0).all()
        if kind == "sampler":
            probabilities = cfol.rule.class_probabilities(state)
            assert float(probabilities[0]) == 0
            assert (probabilities[present] > 0).all()
            assert float(probabilities.sum()) == pytest.approx(1)
        else:
            weight = cfol.rule.class_weight(state, TradesLoss(), epoch=4)
            assert weight.shape == (2, num_classes)
            assert torch.equal(weight[0], weight[1])
            assert float(weight[0].sum()) == pytest.approx(num_classes - 1)


def test_others_borrow_it_as_a_weight():
    ham = HAM(mining_start_epoch=0, mining_step=1, class_weighting="cfol", class_rule_args={"cfol_eta": 0.1})
    ham.check(num_steps=3)
    assert ham.weights == CFOLRule(cfol_as="weight", cfol_eta=0.1)
    assert CFOLRule.lent(cfol_as="sampler") == CFOLRule()
    states = initial_states(ham)
    assert [rule.class_probabilities(states[rule.name]) for rule in ham.rules] == [None]
