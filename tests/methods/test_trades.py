"""TRADES and MART against the authors' numbers, alone and as the loss that HAM is built on."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ham_hf.attacks import Attack, ThreatModel, evaluation_mode, pgd
from ham_hf.methods import HAM, MartLoss, TradesLoss
from ham_hf.methods.bat import BalanceLoss
from tests.support.golden_data import golden_net
from tests.support.method_checks import exact, golden_batch, golden_noise, initial_states, rows_of, starting_at


@pytest.mark.parametrize("loss", [TradesLoss(), MartLoss(), BalanceLoss()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("size", [90.0, 300.0])
def test_certain_predictions_stay_finite_in_single_and_half_precision(loss, size):
    logits = size * torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]] * 2)
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(dtype).requires_grad_()
        terms = loss.terms(given, torch.zeros(2 if loss.name == "bat" else 3, dtype=torch.long))
        assert terms.dtype == torch.float32
        assert torch.isfinite(terms).all()
        (gradient,) = torch.autograd.grad(terms.sum(), given)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("base_loss", "beta"), [("trades", 6.0), ("mart", 5.0)])
def test_ham_mines_with_the_attack_of_the_loss_and_trains_on_pairs(base_loss, beta):
    x, y = golden_batch(32)
    net = golden_net()
    ham = HAM(mining_start_epoch=0, mining_step=3, base_loss=base_loss, beta=beta)
    states = initial_states(ham)
    attack = Attack(threat_model=ThreatModel("linf", 0.024), num_steps=10, step_size=0.0028)
    with starting_at(normal=golden_noise("normal", 32)):
        batch = rows_of(ham, net, x, y, attack=attack, epoch=0, states=states)
    with evaluation_mode(net):
        clean = net(x).softmax(1).detach()

    def divergence(logits, labels):
        rows = slice(None) if len(logits) == 32 else batch.hard
        return F.kl_div(logits.log_softmax(1), clean[rows], reduction="none").sum(1)

    options = {"threat_model": attack.threat_model, "step_size": 0.0028}
    if base_loss == "trades":
        options["loss_fn"] = divergence
    early = pgd(net, x, y, num_steps=3, start=x + 0.001 * golden_noise("normal", 32), **options)
    with evaluation_mode(net):
        hard = net(early).argmax(1) != y
    assert 0 < hard.sum() < 32
    assert torch.equal(batch.hard, hard)
    full = pgd(net, x, y, num_steps=10, start=x + 0.001 * golden_noise("normal", 32), **options)
    everything = base_loss == "trades"
    clean_rows = x if everything else x[hard]
    exact(batch.x, torch.cat([full[hard], clean_rows]), 1e-12)
    assert torch.equal(batch.y, y if everything else y[hard])
    weight, divisor = ham.weigh(batch, epoch=0, states=states)
    in_second = hard if everything else torch.ones_like(batch.y)
    assert weight.tolist() == [[1.0] * len(batch.y), (beta * in_second).tolist()]
    assert divisor.tolist() == [len(batch.y)] * 2
