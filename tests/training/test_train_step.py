"""One update: the authors' numbers, the global normalizer, skipped updates, single rows, infinite losses."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import HAM, PGDAT, Method, TrainingRows
from ham_hf.training.train_step import NonFiniteLossError
from tests.support.golden_data import Normalized, exact, golden_case, golden_net, group
from tests.support.method_checks import attack_of
from tests.support.nets import batch_norm_net, group_norm_net, labeled_for, pixel_batch
from tests.support.updates import train_step

NO_ATTACK = Attack(threat_model=ThreatModel("linf", 0.0), num_steps=2, step_size=0.01)
MINE_NOW = HAM(mining_start_epoch=0, mining_step=1)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def make_step(net, accelerator, objective=MINE_NOW, attack=NO_ATTACK, *, num_classes=4, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=1.0)
    counts = torch.full((num_classes,), 10)
    return train_step(net, optimizer, objective, attack, accelerator, class_counts=counts, seed=0, **options)


class Recorded(torch.optim.SGD):
    """SGD that keeps the gradients it was given."""

    def step(self, closure=None):
        self.seen = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]
        return super().step(closure)


def assert_moved_by(net, before, gradients):
    """A step of rate 1 was made from the parameters ``before``."""
    for parameter, old, gradient in zip(net.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - parameter, gradient, rtol=1e-9, atol=1e-12)


def copies(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def start_with(monkeypatch, start):
    """Replace the random start by recorded noise: golden cases come with theirs."""
    monkeypatch.setattr(ThreatModel, "random_start", lambda self, x, generator=None: start)


@pytest.mark.parametrize("name", ["pgd_at", "ham_m1", "ham_m3", "ham_m5", "ham_norm", "ham_recross"])
def test_update_gives_the_authors_loss_gradients_buffers_and_weights(name, accelerator, monkeypatch):
    case, net = golden_case(name), golden_net()
    hyper = case.parameters
    start_with(monkeypatch, case.start)
    optimizer = Recorded(
        net.parameters(), lr=hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"]
    )
    model = Normalized(net, hyper["mean"], hyper["std"]) if hyper.get("normalize") else net
    objective = PGDAT() if name == "pgd_at" else HAM(mining_start_epoch=0, mining_step=hyper["classify_step"])
    step = make_step(model, accelerator, objective, attack_of(hyper), num_classes=10, optimizer=optimizer)
    totals = step([pixel_batch(case.x, case.y)], epoch=0, step=0)
    assert totals.loss == pytest.approx(float(case.out["loss"]), abs=1e-9)
    names = [name for name, _ in net.named_parameters()]
    gradients = dict(zip(names, optimizer.seen, strict=True))
    assert gradients.keys() == group(case.out, "grad/").keys()
    for parameter, expected in group(case.out, "grad/").items():
        exact(gradients[parameter], expected)
    state = net.state_dict()
    for key, expected in (group(case.out, "param_after/") | group(case.out, "buffer_after/")).items():
        exact(state[key], expected)
    if name != "pgd_at":
        assert totals.hard == int(case.out["hard_mask"].sum())
        assert totals.mined == totals.seen == len(case.y)
        reported = float(case.out["reported_train_robust_loss"])
        assert totals.loss * totals.hard / totals.seen == pytest.approx(reported, abs=1e-9)


def test_update_without_a_hard_example_changes_nothing_where_the_authors_code_drifts_or_dies(accelerator, monkeypatch):
    case, net = golden_case("ham_alleasy"), golden_net()
    start_with(monkeypatch, case.start)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    before = copy.deepcopy(net.state_dict())
    average = ModelEmaV3(net, decay=0.5)
    attack = Attack(threat_model=ThreatModel("linf", 0.024), num_steps=10, step_size=0.0022)
    options = {"num_classes": 10, "optimizer": optimizer, "average": average}
    step = make_step(net, accelerator, HAM(mining_start_epoch=0, mining_step=3), attack, **options)
    totals = step([pixel_batch(case.x, case.y)], epoch=0, step=7)
    assert (totals.updates, totals.loss, totals.hard, totals.mined) == (0, 0, 0, 10)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(average.module.state_dict()[key], before[key])
    assert all(torch.equal(s["momentum_buffer"], torch.ones_like(p)) for p, s in optimizer.state.items())
    drift = group(case.out, "zero_weight_variant/param_after/")
    assert max((drift[key] - before[key]).abs().max() for key in drift) > 1e-6


def test_counts_per_class(accelerator):
    net = group_norm_net()
    x = torch.rand(9, 3, 6, 6, dtype=torch.float64)
    y = labeled_for(net, x, [True, False, True] * 3)
    step = make_step(net, accelerator)
    step([pixel_batch(x[:5], y[:5]), pixel_batch(x[5:], y[5:])], epoch=0, step=0)
    hard = [sum(1 for i in range(9) if y[i] == c and i % 3 != 1) for c in range(4)]
    everyone = [int((y == c).sum()) for c in range(4)]
    shares = [count / sum(hard) for count in hard]
    torch.testing.assert_close(step.method_state.log, torch.tensor([hard, everyone, everyone, shares]).double())


def test_a_single_hard_row_trains_and_keeps_its_own_gradient(accelerator):
    net = batch_norm_net()
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    y = labeled_for(net, x, [False, False, True, False])
    before = copy.deepcopy(net.state_dict())
    totals = make_step(net, accelerator)([pixel_batch(x, y)], epoch=0, step=0)
    assert (totals.updates, totals.hard) == (1, 1)
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    assert not torch.equal(before["6.bias"], net.state_dict()["6.bias"])
    # Without batch statistics the duplicated row must make no difference at all.
    plain = group_norm_net()
    y = labeled_for(plain, x, [False, False, True, False])
    gradient = torch.autograd.grad(F.cross_entropy(plain(x[2:3]), y[2:3]), list(plain.parameters()))
    old = copies(plain)
    make_step(plain, accelerator)([pixel_batch(x, y)], epoch=0, step=0)
    assert_moved_by(plain, old, gradient)


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(accelerator, what):
    net = group_norm_net()
    if what == "loss":
        torch.nn.init.constant_(net[5].weight[0], float("nan"))
    else:
        net[5].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(net.state_dict())
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(NonFiniteLossError, match=rf"{what} of update 41 is not finite.*--learning_rate"):
        make_step(net, accelerator, PGDAT())([pixel_batch(x, torch.zeros(4, dtype=torch.long))], epoch=0, step=41)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_weights_of_rows_normalize_the_loss(accelerator):
    @dataclass(frozen=True, kw_only=True)
    class Weighted(Method):
        name: ClassVar[str] = "weighted_for_a_test"

        def inner_maximization(self, model, batch):
            return TrainingRows(x=batch.x, y=batch.y, weight=1 + torch.arange(len(batch.y), dtype=batch.x.dtype))

    net = group_norm_net()
    x, y = torch.rand(5, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    weights = torch.arange(1, 6, dtype=torch.float64)
    loss = (F.cross_entropy(net(x), y, reduction="none") * weights).sum() / weights.sum()
    expected = torch.autograd.grad(loss, list(net.parameters()))
    old = copies(net)
    totals = make_step(net, accelerator, Weighted())([pixel_batch(x, y)], epoch=0, step=0)
    assert totals.loss == pytest.approx(loss.item())
    assert_moved_by(net, old, expected)


def test_gradient_is_clipped_after_it_was_normalized(accelerator):
    net = group_norm_net()
    x, y = torch.rand(6, 3, 6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    old = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    make_step(net, accelerator, PGDAT(), max_grad_norm=1e-3)([pixel_batch(x, y)], epoch=0, step=0)
    new = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    assert float((new - old).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_dropout_repeats_with_the_step_and_not_between_steps(accelerator):
    def run(step_number):
        net = nn.Sequential(group_norm_net(), nn.Dropout(0.5)).double()
        x = torch.rand(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.rand(step_number + 3)
        step = make_step(net, accelerator, PGDAT())
        return step([pixel_batch(x, torch.zeros(8, dtype=torch.long))], epoch=0, step=step_number).loss

    assert run(2) == run(2)
    assert run(2) != run(3)


def test_the_wrapped_model_is_forwarded_once_per_accumulation_step(accelerator):
    net, calls = group_norm_net(), []
    step = make_step(net, accelerator)
    step.model = nn.Sequential(net)
    step.model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    x = torch.rand(8, 3, 6, 6, dtype=torch.float64)
    y = labeled_for(net, x, [True] * 3 + [False] * 5)
    step([pixel_batch(x[:4], y[:4]), pixel_batch(x[4:], y[4:])], epoch=0, step=0)
    assert calls == [3]
