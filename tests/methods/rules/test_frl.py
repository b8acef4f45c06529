"""FRL: multipliers, weights, radii and losses against the authors' numbers; classes without held-out images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ham_hf.attacks import input_gradient
from ham_hf.methods import HAM, Batch
from ham_hf.methods.rules.frl import FRL
from tests.support.golden_data import exact, golden_batch, golden_net, golden_noise, golden_tensors, starting_at
from tests.support.method_checks import attack_of, golden_frl, initial_states, rows_of, update_loss

TENSORS, HYPER = golden_tensors("frl")
ATTACK = attack_of(HYPER)


@pytest.mark.parametrize("variant", ["rw", "rw_rm"])
def test_multipliers_weights_and_radii_are_the_authors_over_epochs(variant):
    frl, epochs = golden_frl(variant)
    for epoch, states in epochs:
        state = states["frl"]
        for found, name in zip((*state["multipliers"], state["radius"]), ("0", "1", "2"), strict=True):
            exact(found, TENSORS[f"out/{variant}/lmbda{name}"][epoch])
        weight = frl.rule.class_weight(state, frl.loss, epoch=epoch) / 10
        exact(weight[0], TENSORS[f"out/{variant}/weight0"][epoch])
        exact(weight[1], TENSORS[f"out/{variant}/weight1"][epoch])
        expected = TENSORS[f"out/{variant}/eps_multiplier"][epoch] * HYPER["epsilon"]
        of_class = frl.rule.class_attack(state, ATTACK, epoch=epoch)
        if variant == "rw":
            assert of_class is None
            assert expected.tolist() == [HYPER["epsilon"]] * 10
        else:
            exact(of_class[0], expected)


def test_step_is_of_the_largest_radius_of_all_classes_where_the_authors_take_the_batch():
    (frl, epochs), net = golden_frl("rw_rm"), golden_net()
    *_, (epoch, states) = epochs
    x, y = golden_batch(64)
    radius, step = frl.rule.class_attack(states["frl"], ATTACK, epoch=epoch)
    assert step.tolist() == [float(radius.max()) / 4] * 10
    rows = (y != radius.argmax()).nonzero().squeeze(1)
    theirs = float(radius[y[rows]].max()) / 4
    assert theirs < float(step[0])
    with starting_at(normal=golden_noise("normal", 64)):
        whole = rows_of(frl, net, x, y, attack=ATTACK, epoch=epoch, states=states)
    with starting_at(normal=golden_noise("normal", 64)[rows]):
        part = rows_of(frl, net, x[rows], y[rows], attack=ATTACK, epoch=epoch, states=states)
    exact(part.x[: len(rows)], whole.x[rows])


def test_held_out_counts_by_hand():
    frl, net = FRL(), golden_net()
    x, y = golden_batch(32)
    with starting_at(uniform=golden_noise("uniform", 32)):
        sums = frl.rule.held_out_sums(net, Batch(x=x, y=y, attack=ATTACK, epoch=0), loss=frl.loss, num_classes=10)
    x_adv = (x + golden_noise("uniform", 32)).clamp(0, 1)
    epsilon = HYPER["epsilon"]
    for _ in range(20):
        x_adv = x_adv + epsilon / 4 * input_gradient(net, x_adv, y).sign()
        x_adv = x_adv.clamp(x - epsilon, x + epsilon).clamp(0, 1)
    expected = torch.zeros(3, 10, dtype=torch.float64)
    clean, robust = net(x).argmax(1), net(x_adv).argmax(1)
    for i, label in enumerate(y.tolist()):
        expected[:, label] += torch.tensor([1.0, float(clean[i] == label), float(robust[i] == label)])
    assert torch.equal(sums, expected)
    assert 0 < expected[2].sum() < expected[1].sum() < 32
    assert frl.rule.wants_held_out(0)
    assert frl.rule.wants_held_out(7)


def test_rate_of_the_weights_is_halved_before_the_fortieth_epoch_and_the_eightieth():
    sums = torch.tensor([[10.0, 10.0], [2.0, 8.0], [1.0, 7.0]], dtype=torch.float64)
    gained = {}
    for epoch in (0, 38, 39, 78, 79):
        frl = FRL(frl_bound=0.0)
        state = frl.rule.initial_state(torch.ones(2, dtype=torch.float64))
        frl.rule.after_held_out(state, sums, epoch=epoch)
        gained[epoch] = float(state["multipliers"][0, 0])
    assert list(gained.values()) == pytest.approx([0.3 * rate for rate in (0.05, 0.05, 0.025, 0.025, 0.0125)])


@pytest.mark.parametrize("num_classes", [3, 10, 100])
def test_classes_without_held_out_images_count_as_average(num_classes):
    torch.manual_seed(0)
    frl = FRL(frl_bound=0.0, frl_rate1=1.0)
    state = frl.rule.initial_state(torch.ones(num_classes, dtype=torch.float64))
    count = torch.randint(1, 30, (num_classes,)).double()
    count[1:] *= torch.rand(num_classes - 1) > 0.3
    count[1] = 0
    clean = (torch.rand(num_classes) * count).floor()
    robust = (torch.rand(num_classes) * clean).floor()
    for epoch in range(3):
        frl.rule.after_held_out(state, torch.stack([count, clean, robust]), epoch=epoch)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["multipliers"][:, 1].tolist() == [0.0, 0.0]
    assert float(state["radius"][1]) == 0
    assert (state["multipliers"].sum(1) <= 0.5 + 1e-12).all()
    assert (state["multipliers"].sum(1) > 0).all()
    weight = frl.rule.class_weight(state, frl.loss, epoch=0)
    assert float(weight.min()) >= 0.5 - 1e-12
    assert weight.mean(1).tolist() == pytest.approx([1.0, 1.0])
    frl.rule.after_held_out(state, torch.zeros(3, num_classes, dtype=torch.float64), epoch=3)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_ham_borrows_weights_and_radii():
    ham = HAM(mining_start_epoch=0, mining_step=3, base_loss="trades", class_weighting="frl", class_margin="frl")
    ham.check(num_steps=10)
    states = initial_states(ham)
    states["frl"]["multipliers"][:, 3] = torch.tensor([0.4, 0.2], dtype=torch.float64)
    states["frl"]["radius"][3] = 0.5
    x, y = golden_batch(64)
    with starting_at(normal=golden_noise("normal", 64)):
        batch = rows_of(ham, golden_net(), x, y, attack=ATTACK, epoch=0, states=states)
    num_hard, hard_y = int(batch.hard.sum()), y[batch.hard]
    assert torch.equal(batch.adversarial_y, hard_y)
    moved = (batch.x[:num_hard] - x[batch.hard]).abs().flatten(1).amax(1)
    assert (moved[hard_y == 3] > HYPER["epsilon"] * 1.5).all()
    assert (moved[hard_y != 3] <= HYPER["epsilon"] + 1e-12).all()
    assert 0 < int((hard_y == 3).sum()) < num_hard < len(y)
    loss, logits = update_loss(ham, golden_net(), batch, epoch=0, states=states)
    adversarial, clean = logits[:num_hard], logits[num_hard:]
    natural = F.cross_entropy(clean, y, reduction="none")
    kept = clean[batch.hard]
    divergence = (kept.softmax(1) * (kept.log_softmax(1) - adversarial.log_softmax(1))).sum(1)
    expected = 0
    for scale, multiplier, term, labels in ((1, 0.4, natural, y), (ham.loss.beta, 0.2, divergence, hard_y)):
        weights = torch.full((10,), 0.1 - multiplier / 10, dtype=torch.float64)
        weights[3] += multiplier
        expected += scale * (weights[labels] * term).sum() / weights[y].sum()
    exact(loss, expected)
