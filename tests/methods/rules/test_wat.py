"""WAT: Hedge weights, held-out costs and losses against the authors' numbers; costs by count instead of by size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ham_hf.attacks import evaluation_mode, pgd
from ham_hf.methods import BASE_LOSSES, Batch
from ham_hf.methods.rules.wat import WAT, hedge_weights, mean_costs
from tests.support.golden_data import exact, golden_batch, golden_net, golden_noise, golden_tensors, starting_at
from tests.support.method_checks import attack_of

TENSORS, HYPER = golden_tensors("wat")
OPTIONS = {"beta": HYPER["beta"], "wat_eta": HYPER["eta"]}
ATTACK = attack_of(HYPER)


def held_out(wat, net, slices, loss=None):
    x, y = golden_batch(HYPER["rows"])
    sums = []
    for rows in slices:
        with starting_at(normal=golden_noise("normal", HYPER["rows"])[rows]), evaluation_mode(net):
            batch = Batch(x=x[rows], y=y[rows], attack=ATTACK, epoch=1, generator=torch.Generator().manual_seed(0))
            found = wat.rule.held_out_sums(net, batch, loss=loss or wat.loss, num_classes=10)
        sums.append(found)
    return torch.stack(sums).sum(0)


def test_weights_of_the_arms_are_the_authors_over_epochs():
    cost = (TENSORS["in/nat_cost"] + HYPER["beta"] * TENSORS["in/bndy_cost"]).cumsum(0)
    for epoch, expected in enumerate(TENSORS["out/weights_after_epoch"]):
        exact(hedge_weights(cost[epoch], HYPER["eta"]), expected)


def test_costs_accumulate_over_epochs():
    wat = WAT(wat_eta=0.3)
    state = wat.rule.initial_state(torch.ones(2, dtype=torch.float64))
    assert [wat.rule.wants_held_out(epoch) for epoch in range(3)] == [False, True, True]
    assert state["weight"].tolist() == [1.0] * 3
    assert wat.rule.class_weight(state, wat.loss, epoch=0).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    for sums in ([[4.0, 1.0], [8.0, 5.0]], [[4.0, 1.0], [4.0, 1.5]]):
        wat.rule.after_held_out(state, torch.tensor(sums, dtype=torch.float64), epoch=1)
    costs = torch.tensor([2 + 1, 5 + 1.5, 13 / 5 + 5.5 / 5], dtype=torch.float64)
    arms = 2 * (0.3 * costs).exp() / (0.3 * costs).exp().sum()
    exact(state["weight"], arms)
    exact(wat.rule.class_weight(state, wat.loss, epoch=2), (arms[:2] + arms[2]).repeat(2, 1))


def test_held_out_costs_differ_from_the_authors_by_their_sizes_alone():
    wat, split = WAT(**OPTIONS), HYPER["val_split"]
    sums = held_out(wat, golden_net(), (slice(0, split), slice(split, HYPER["rows"])))
    assert sums[0].tolist() == golden_batch(HYPER["rows"])[1].bincount(minlength=10).tolist()
    theirs = TENSORS["out/validate/nat_cost"] + HYPER["beta"] * TENSORS["out/validate/bndy_cost"]
    counted_as = 2 * split  # two batches of the full size; and every class as if it had a tenth of them
    exact(sums[1] * 10 / counted_as, theirs[:-1])
    exact(sums[1].sum() / counted_as, theirs[-1])
    ours = mean_costs(sums)
    exact(ours[:-1] * sums[0] * 10 / counted_as, theirs[:-1])
    exact(ours[-1] * HYPER["rows"] / counted_as, theirs[-1])
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("name", ["pgd_at", "mart"])
def test_cost_is_the_loss_of_the_run_under_its_own_attack(name):
    loss, net = BASE_LOSSES[name](beta=5.0), golden_net()
    x, y = golden_batch(HYPER["rows"])
    if name == "mart":
        start = x + 0.001 * golden_noise("normal", HYPER["rows"])
    else:
        start = ATTACK.threat_model.random_start(x, torch.Generator().manual_seed(0))
    x_adv = pgd(net, x, y, threat_model=ATTACK.threat_model, num_steps=10, step_size=0.0028, start=start)
    adversarial, clean = net(x_adv), net(x)
    if name == "pgd_at":
        cost = F.cross_entropy(adversarial, y, reduction="none")
    else:
        boosted, divergence = loss.terms(torch.cat([adversarial, clean]), y)
        cost = boosted + 5 * divergence
    sums = held_out(WAT(), net, [slice(0, HYPER["rows"])], loss)
    exact(sums[1], torch.zeros(10, dtype=torch.float64).index_add(0, y, cost.detach()))


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_classes_without_held_out_images_cost_the_average(num_classes):
    wat = WAT()
    state = wat.rule.initial_state(torch.ones(num_classes, dtype=torch.float64))
    sums = 1 + torch.rand(2, num_classes, dtype=torch.float64) * 50
    sums[:, 1] = 0
    for epoch in range(1, 20):
        wat.rule.after_held_out(state, sums, epoch=epoch)
    assert float(state["cost"][1]) == pytest.approx(float(19 * sums[1].sum() / sums[0].sum()))
    wat.rule.after_held_out(state, torch.zeros_like(sums), epoch=20)
    weight = wat.rule.class_weight(state, wat.loss, epoch=20)
    assert weight.shape == (2, num_classes)
    assert torch.isfinite(weight).all()
    assert float(state["weight"].sum()) == pytest.approx(num_classes)
