"""BAT: both points, terms, loss and gradients against the authors' numbers; one path in place of two attacks."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ham_hf.attacks import Attack, ThreatModel, evaluation_mode, input_gradient
from ham_hf.methods import TrainingRows
from ham_hf.methods.bat import BAT, BalanceLoss
from tests.support.golden_data import exact, golden_batch, golden_net, golden_noise, golden_tensors, starting_at
from tests.support.method_checks import assert_loss_and_gradients, attack_of, rows_of

TENSORS, HYPER = golden_tensors("bat")


def points(net, x, y, noise, attack):
    """First wrong and last correct points, from the rows of one attack."""
    with starting_at(normal=noise):
        batch = rows_of(BAT(), net, x, y, attack=attack)
    wrong, correct, clean = batch.x.chunk(3)
    assert torch.equal(clean, x)
    assert torch.equal(batch.y, y)
    assert batch.weight.tolist() == [1.0] * len(y)
    return wrong, correct


def test_each_point_is_the_authors_given_their_noise_for_it_and_so_are_loss_and_gradients():
    (x, y), noise = golden_batch(size=32), golden_noise("normal", size=32)
    net, bat = golden_net(), BAT(beta=HYPER["beta"])
    _, correct = points(net, x, y, noise[0], attack_of(HYPER))
    wrong, _ = points(net, x, y, noise[1], attack_of(HYPER))
    for name, found in (("last_clean", correct), ("first_adv", wrong)):
        order = TENSORS[f"out/{name}_order"]
        exact(found[order], TENSORS[f"out/{name}"])
        assert torch.equal(y[order], TENSORS[f"out/{name}_y"])
    batch = TrainingRows(x=torch.cat([wrong, correct, x]), y=y, weight=torch.ones(8, dtype=torch.float64))
    logits = assert_loss_and_gradients(bat, net, batch, epoch=0, states={}, tensors=TENSORS, prefix="out/")
    blocks = [("first_adv", "first_adv"), ("last_clean", "last_clean"), ("natural", "first_adv")]
    for found, (name, ordered_as) in zip(logits.chunk(3), blocks, strict=True):
        order = TENSORS[f"out/{ordered_as}_order"]
        exact(found[order], TENSORS[f"out/logits_{name}"])
    weight, divisor = bat.weigh(batch, epoch=0, states={})
    assert divisor.tolist() == [8.0] * 3
    terms = (weight * bat.losses(logits, batch)).sum(1) / divisor
    expected = [TENSORS[f"out/term_{name}"] for name in ("natural", "beta_robust", "uniform")]
    exact(terms, torch.stack(expected))


def alone(net, x, y, start, *, epsilon, size, num_steps):
    """Both points of one row, each by an attack of its own, and what was met: wrong at once, never, right again."""
    with evaluation_mode(net), torch.no_grad():
        clean = net(x[None]).softmax(1)
    path = [start]
    for _ in range(num_steps):
        gradient = input_gradient(
            net, path[-1][None], y[None], lambda z, _: F.kl_div(z.log_softmax(1), clean, reduction="none").sum(1)
        )[0]
        path.append((path[-1] + size * gradient.sign()).clamp(x - epsilon, x + epsilon).clamp(0, 1))
    with evaluation_mode(net), torch.no_grad():
        looks = (net(torch.stack(path[:-1])).argmax(1) != y).nonzero().squeeze(1).tolist()
    if not looks:
        return path[-1], path[-1], "never"
    again = looks[0] + 1 < num_steps and looks[0] + 1 not in looks
    kind = "again" if again else "at once" if looks[0] == 0 else "plain"
    return path[looks[1]] if len(looks) > 1 else path[-1], path[max(looks[0] - 1, 0)], kind


def test_both_points_lie_on_one_path():
    x, y = golden_batch(64)
    net = golden_net()
    attack = Attack(threat_model=ThreatModel("linf", 0.02), num_steps=8, step_size=0.05)
    wrong, correct = points(net, x, y, golden_noise("normal", 64), attack)
    start = (x + 0.001 * golden_noise("normal", 64)).clamp(0, 1)
    kinds = set()
    for i in range(len(y)):
        first, last, kind = alone(net, x[i], y[i], start[i], epsilon=0.02, size=0.05, num_steps=8)
        exact(wrong[i], first, 1e-12)
        exact(correct[i], last, 1e-12)
        kinds.add(kind)
    assert kinds == {"plain", "at once", "never", "again"}


def test_one_path_costs_no_more_than_the_second_of_the_two_published_attacks():
    (x, y), noise = golden_batch(size=32), golden_noise("normal", size=32)
    net, rows = golden_net(), []
    net.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    with evaluation_mode(net):
        points(net, x, y, noise[1], attack_of(HYPER))
    assert rows[0] == 8  # the clean prediction that the divergence is from
    steps = rows[1:]
    assert steps == sorted(steps, reverse=True)
    assert sum(steps) < 8 * HYPER["num_steps"]


def test_the_start_is_clipped():
    x = torch.tensor([0.0, 1.0]).repeat(500).view(1, 1, 10, 100)
    start = BalanceLoss().start(x, ThreatModel(), torch.Generator().manual_seed(0))
    assert float(start.min()) == 0
    assert float(start.max()) == 1
    assert 0.3 < float((start != x).double().mean()) < 0.7
