"""CFA: class radii, class regularization and losses against the authors' numbers."""

from __future__ import annotations

import pytest
import torch

from ham_hf.attacks import input_gradient
from ham_hf.methods import CFA
from tests.support.golden_data import exact, golden_batch, golden_net, golden_tensors, starting_at
from tests.support.method_checks import CFA_OPTIONS, assert_loss_and_gradients, attack_of, initial_states, rows_of

TENSORS, HYPER = golden_tensors("cfa")


def states_of(objective, accuracies):
    states = initial_states(objective)
    states["cfa"]["robust_accuracy"] = accuracies.clone()
    return states


@pytest.mark.parametrize("rule", [0, 1, 2])
@pytest.mark.parametrize("when", ["before_begin", "from_begin"])
def test_class_radius_and_beta_follow_the_authors_rules(rule, when):
    cfa = CFA(**CFA_OPTIONS)
    epoch = HYPER["begin"] - (when == "before_begin")
    state = states_of(cfa, TENSORS["in/class_robust_acc"][rule])["cfa"]
    expected = TENSORS[f"out/rule/{rule}/{when}/class_eps"]
    of_class = cfa.rule.class_attack(state, attack_of(HYPER), epoch=epoch)
    if when == "before_begin":
        assert of_class is None
        assert expected.tolist() == pytest.approx([HYPER["epsilon"]] * 10)
    else:
        exact(of_class[0], expected)
        assert of_class[1].tolist() == [HYPER["step_size"]] * 10
    weight = cfa.rule.class_weight(state, cfa.loss, epoch=epoch)
    fraction = TENSORS[f"out/rule/{rule}/{when}/class_beta_fraction"]
    # Ours are relative to the scales (1, beta) of the two terms.
    exact(weight[1] * HYPER["beta"], fraction)
    exact(weight[0], 1 - fraction)


def test_accuracy_of_a_class_is_of_its_own_count_where_the_authors_take_balanced_batches():
    y, logits = golden_batch(HYPER["rows"])[1], TENSORS["out/ccm_ccr_trades/robust_logits"]
    counts = CFA().rule.observe(logits, y, epoch=10)
    logged = TENSORS["out/ccm_ccr_trades/log/class_robust_acc"]
    exact(counts[:, 0] * 10 / len(y), logged)
    assert not torch.allclose(counts[:, 0] / counts[:, 1].clamp(min=1), logged)


def test_pgd_variant_differs_from_the_authors_by_the_mode_of_the_attack_alone():
    cfa, net = CFA(base_loss="pgd_at", **CFA_OPTIONS), golden_net()
    states = states_of(cfa, TENSORS["in/class_robust_acc"][0])
    x, y = golden_batch(HYPER["rows"])
    noise = TENSORS["in/unit_noise"].double()
    radius = cfa.rule.class_attack(states["cfa"], attack_of(HYPER), epoch=10)[0][y].view(-1, 1, 1, 1)
    # Theirs attacks in training mode, so with the statistics of the batch.
    theirs = (x + (2 * noise - 1) * radius).clamp(0, 1)
    stepped = theirs
    net.train()
    for _ in range(HYPER["num_steps"]):
        adversarial = stepped.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(net(adversarial), y)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        stepped = (stepped + HYPER["step_size"] * gradient.sign()).clamp(x - radius, x + radius).clamp(0, 1)
    exact(stepped, TENSORS["out/ccm_at/x_adv"])
    ours = theirs
    net.eval()
    for _ in range(HYPER["num_steps"]):
        ours = (ours + HYPER["step_size"] * input_gradient(net, ours, y).sign()).clamp(x - radius, x + radius)
        ours = ours.clamp(0, 1)
    with starting_at(uniform=theirs - x):
        batch = rows_of(cfa, net, x, y, attack=attack_of(HYPER), epoch=10, states=states)
    exact(batch.x, ours, 1e-12)
    # On the authors' images the loss and its gradient are the authors'.
    same = type(batch)(x=TENSORS["out/ccm_at/x_adv"], y=y, weight=batch.weight)
    assert_loss_and_gradients(cfa, golden_net(), same, epoch=10, states=states, tensors=TENSORS, prefix="out/ccm_at/")


def test_accuracy_of_the_epoch_before_decides_and_missing_classes_keep_theirs():
    cfa = CFA(cfa_start_epoch=1)
    state = cfa.rule.initial_state(torch.ones(4, dtype=torch.float64))
    logits = torch.eye(4)[[0, 0, 1, 2]]
    cfa.rule.after_update(state, cfa.rule.observe(logits, torch.tensor([0, 1, 1, 2]), epoch=0), epoch=0)
    cfa.rule.after_update(state, cfa.rule.observe(logits[:0], torch.zeros(0, dtype=torch.long), epoch=0), epoch=0)
    cfa.rule.before_epoch(state, epoch=1)
    attack = attack_of({"epsilon": 0.1, "step_size": 0.02, "num_steps": 3})
    assert cfa.rule.class_attack(state, attack, epoch=1)[0].tolist() == pytest.approx([0.15, 0.1, 0.15, 0.1])
    cfa.rule.after_update(state, cfa.rule.observe(logits, torch.tensor([1, 1, 1, 1]), epoch=1), epoch=1)
    cfa.rule.before_epoch(state, epoch=2)
    assert cfa.rule.class_attack(state, attack, epoch=2)[0].tolist() == pytest.approx([0.15, 0.075, 0.15, 0.1])


def test_parts_can_be_switched():
    attack = attack_of(HYPER)
    for margin in (True, False):
        for regularization in (True, False):
            cfa = CFA(cfa_margin=margin, cfa_regularization=regularization, cfa_start_epoch=1)
            state = states_of(cfa, torch.full((10,), 0.3, dtype=torch.float64))["cfa"]
            assert (cfa.rule.class_attack(state, attack, epoch=1) is not None) is margin
            assert (cfa.rule.class_weight(state, cfa.loss, epoch=1) is not None) is regularization
