"""FAT: stopping points, loss and gradients against the authors' numbers, and one row at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ham_hf.attacks import Attack, ThreatModel, evaluation_mode, input_gradient
from ham_hf.methods.fat import FAT
from tests.support.golden_data import exact, golden_batch, golden_net, golden_noise, golden_tensors, starting_at
from tests.support.method_checks import attack_of, initial_states, rows_of

TENSORS, HYPER = golden_tensors("fat")
# Long steps, so that some rows become right again after they were wrong.
LONG = Attack(threat_model=ThreatModel("linf", 0.04), num_steps=8, step_size=0.1)


@pytest.mark.parametrize("tau", HYPER["taus"])
def test_the_attack_steps_as_often_as_the_authors(tau, monkeypatch):
    (x, y), noise = golden_batch(size=32), golden_noise("uniform", size=32)
    rows, step = [], ThreatModel.step
    # The rows that a step moves.
    monkeypatch.setattr(ThreatModel, "step", lambda self, x, *more: rows.append(len(x)) or step(self, x, *more))
    with starting_at(uniform=noise):
        fat = FAT(fat_tau_epochs=tuple(range(tau)), fat_omega=0.0)
        rows_of(fat, golden_net(), x, y, attack=attack_of(HYPER), epoch=2)
    assert sum(rows) == int(TENSORS[f"out/tau{tau}/count"])


def alone(net, x, y, *, start, attack, tau, noises):
    """The attack on one row, in words: classify; stop if wrong and nothing is left of tau; else continue."""
    x_adv, budget, seen = start, tau, []
    epsilon, size = attack.threat_model.epsilon, attack.step_size
    for noise in noises:
        with evaluation_mode(net):
            wrong = bool(net(x_adv[None]).argmax(1) != y)
        seen.append(wrong)
        if wrong and budget == 0:
            break
        budget -= wrong
        gradient = input_gradient(net, x_adv[None], y[None])[0]
        x_adv = (x_adv + size * gradient.sign() + noise).clamp(x - epsilon, x + epsilon).clamp(0, 1)
    recrossed = any(before and not after for before, after in pairwise(seen))
    return x_adv, recrossed


@pytest.mark.parametrize(("tau", "margin"), [(0, "cfa"), (1, "none"), (2, "cfa")])
def test_every_row_is_attacked_as_if_it_were_alone(tau, margin):
    x, y = golden_batch(64)
    fat = FAT(fat_tau_epochs=(0,) * tau, fat_omega=0.01, class_margin=margin)
    net, states = golden_net(), initial_states(fat)
    radius = torch.full((10,), 0.04, dtype=torch.float64)
    if margin == "cfa":
        states["cfa"]["robust_accuracy"] = torch.linspace(0, 1, 10, dtype=torch.float64)
        radius = radius * (0.5 + states["cfa"]["robust_accuracy"])
    batch = rows_of(fat, net, x, y, attack=LONG, epoch=10, states=states, seed=5)
    generator = torch.Generator().manual_seed(5)
    start = ThreatModel("linf", radius[y]).random_start(x, generator)
    noises = [0.01 * torch.empty_like(x).normal_(generator=generator) for _ in range(LONG.num_steps)]
    recrossed = 0
    for i in range(len(y)):
        attack = Attack(threat_model=ThreatModel("linf", float(radius[y[i]])), num_steps=8, step_size=0.1)
        expected, again = alone(
            net, x[i], y[i], start=start[i], attack=attack, tau=tau, noises=[noise[i] for noise in noises]
        )
        exact(batch.x[i], expected, 1e-12)
        recrossed += again
    assert (recrossed > 0) == (tau > 0)


def test_tau_grows_at_the_given_epochs():
    assert [FAT().tau(epoch) for epoch in (0, 49, 50, 89, 90, 119)] == [0, 0, 1, 1, 2, 2]
    assert FAT(fat_tau_epochs=()).tau(1000) == 0
    assert FAT(fat_tau_epochs=(0, 0, 7)).tau(0) == 2
