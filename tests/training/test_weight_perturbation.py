"""Adversarial weight perturbation against the authors' numbers and by its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import nn
from torch.nn import functional as F

from ham_hf.training.weight_perturbation import awp_direction, perturbable, perturbed, preserved_buffers
from tests.support.golden_data import exact, golden_case, golden_net, golden_tensors, group
from tests.support.nets import batch_norm_net


def golden_loss(variant, net, beta):
    """The loss of a golden case as a function of nothing, with its forwards in the authors' order."""
    if variant == "at":
        case = golden_case("pgd_at")
        return lambda: F.cross_entropy(net(case.out["x_adv"]), case.y)
    case = golden_case("trades")
    x_adv = case.out["x_adv"]
    x, y = case.x[: len(x_adv)], case.y[: len(x_adv)]

    def trades_loss():
        adversarial, target = net(x_adv), net(x)
        divergence = F.kl_div(adversarial.log_softmax(1), target.softmax(1), reduction="batchmean")
        return F.cross_entropy(net(x), y) + beta * divergence

    return trades_loss


@pytest.mark.parametrize("variant", ["at", "trades"])
def test_one_update_is_the_authors(variant):
    tensors, hyper = golden_tensors("awp")

    def expect(what, values):
        theirs = group(tensors, f"out/{variant}/{what}/")
        assert values.keys() == theirs.keys()
        for name, value in values.items():
            exact(value.detach(), theirs[name])

    net = golden_net().train()
    loss_of = golden_loss(variant, net, hyper[variant].get("beta"))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"]
    )
    weights = perturbable(net)
    names = [name for name, parameter in net.named_parameters() if any(parameter is weight for weight in weights)]

    with preserved_buffers(net):
        loss_of().backward()
    directions = awp_direction(weights)
    expect("direction", dict(zip(names, directions, strict=True)))
    optimizer.zero_grad()
    with perturbed(weights, directions, hyper[variant]["gamma"]):
        expect("param_perturbed", dict(net.named_parameters()))
        loss = loss_of()
        loss.backward()
        optimizer.step()
    exact(loss.detach(), tensors[f"out/{variant}/loss"])
    expect("grad", {name: parameter.grad for name, parameter in net.named_parameters()})
    expect("param_after", dict(net.named_parameters()))
    expect("buffer_after", dict(net.named_buffers()))


def test_perturbable_are_trainable_weights_of_more_than_one_dimension():
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "fc": nn.Linear(4, 4)})
    net["tied"] = nn.Linear(4, 4, bias=False)
    net["tied"].weight = net["fc"].weight
    net["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    net.register_parameter("table", nn.Parameter(torch.ones(2, 2)))
    found = perturbable(net)
    assert len(found) == 2
    assert found[0] is net["conv"].weight
    assert found[1] is net["fc"].weight


def test_a_model_with_nothing_to_perturb_is_an_error():
    with pytest.raises(ValueError, match="nothing to perturb in BatchNorm2d"):
        perturbable(nn.BatchNorm2d(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_direction_has_the_length_of_the_weight_and_points_along_the_gradient(dtype):
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (5, 4)]
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for weight in weights:
        weight.grad = 1e-3 * torch.randn_like(weight)
    before = [weight.grad.clone() for weight in weights]
    for weight, gradient, direction in zip(weights, before, awp_direction(weights), strict=True):
        w, g = weight.detach().double(), gradient.double()
        torch.testing.assert_close(direction, (g * w.norm() / g.norm()).to(dtype))
        assert not direction.requires_grad
        assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_gradient_a_parameter_is_not_moved(dtype):
    weights = [nn.Parameter(torch.ones(2, 3, dtype=dtype)) for _ in range(6)]
    for weight, value in zip(weights[1:], (0.0, float("inf"), float("nan"), 1.0, 1.0), strict=True):
        weight.grad = torch.full_like(weight, value)
    torch.nn.init.zeros_(weights[5])
    directions = awp_direction(weights)
    assert [bool(direction.any()) for direction in directions] == [False] * 4 + [True, False]
    assert all(direction.isfinite().all() and direction.dtype == dtype for direction in directions)


def test_perturbed_subtracts_what_it_added_and_keeps_a_step_made_inside():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    with perturbed([weight], [torch.tensor([[4.0, -8.0]])], 0.25):
        assert torch.equal(weight, torch.tensor([[2.0, 0.0]]))
        with torch.no_grad():
            weight.mul_(0.5)
    assert torch.equal(weight, torch.tensor([[0.0, 2.0]]))
    assert weight.requires_grad


def test_perturbed_subtracts_after_an_exception():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    with pytest.raises(KeyboardInterrupt), perturbed([weight], [torch.tensor([[4.0, -8.0]])], 0.25):
        raise KeyboardInterrupt
    assert torch.equal(weight, torch.tensor([[1.0, 2.0]]))


def norm_act_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, momentum=None))


def other_statistics_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), EvoNorm2dB0(4), nn.InstanceNorm2d(4, track_running_stats=True))


@pytest.mark.parametrize("make", [batch_norm_net, norm_act_net, other_statistics_net])
def test_preserved_buffers_normalize_with_the_batch_and_come_back(make):
    torch.manual_seed(0)
    net = make().double().train()
    x = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    expected = copy.deepcopy(net)(x)
    before = copy.deepcopy(dict(net.named_buffers()))
    with preserved_buffers(net):
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    assert before.keys() == dict(net.named_buffers()).keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    net(x)
    changing = [name for name in before if "num_batches" not in name or make is not other_statistics_net]
    assert not any(torch.equal(net.get_buffer(name), before[name]) for name in changing)


def test_buffers_come_back_after_an_exception():
    net = nn.BatchNorm2d(3)
    net.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), preserved_buffers(net):
        net(torch.rand(2, 3, 4, 4))
    assert int(net.num_batches_tracked) == 0
