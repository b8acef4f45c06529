"""Attacks in 16 bits: the network alone is coarser, the update is not, and no direction is lost in float16."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from accelerate import Accelerator

import ham_hf  # noqa: F401 (registers the CIFAR networks with timm)
from ham_hf.attacks import Attack, ThreatModel, cross_entropy, input_gradient, margin_loss, pgd
from ham_hf.methods import HAM, PGDAT
from ham_hf.precision import attack_passes
from tests.support.nets import pixel_batch
from tests.support.updates import train_step

ATTACK = Attack(threat_model=ThreatModel("linf", 8 / 255), num_steps=4, step_size=2 / 255)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = timm.create_model("resnet18_cifar", num_classes=10)
    with torch.no_grad():
        made.train()(torch.rand(64, 3, 16, 16))
    return made.eval()


@pytest.fixture(scope="module")
def batch(net):
    x = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x).topk(2).indices[torch.arange(32), torch.arange(32) % 2]
    return x, y


@pytest.mark.slow
def test_few_signs_of_the_gradient_differ(net, batch):
    exact, coarse = input_gradient(net, *batch), input_gradient(attack_passes(net, "bf16"), *batch)
    assert coarse.dtype == torch.float32
    differs = exact.sign() != coarse.sign()
    assert 0 < differs.float().mean() < 0.01
    assert exact[differs].abs().sum() < 0.01 * exact.abs().sum()


@pytest.mark.slow
def test_the_attack_is_as_strong_and_stays_in_the_ball(net, batch):
    settings = {"threat_model": ATTACK.threat_model, "num_steps": 10, "step_size": 2 / 255, "start": batch[0]}
    losses = []
    for model in (net, attack_passes(net, "bf16")):
        x_adv = pgd(model, *batch, **settings)
        assert x_adv.dtype == torch.float32
        assert (x_adv - batch[0]).abs().max() <= 8 / 255 + 1e-6
        losses.append(torch.nn.functional.cross_entropy(net(x_adv), batch[1]).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
def test_only_the_attack_of_an_update_is_coarser(net, batch):
    """With no attack step, both precisions make the same update to the bit."""
    after = {}
    still = Attack(threat_model=ThreatModel("linf", 0.0), num_steps=1, step_size=0.1)
    for objective, attack in ((PGDAT(), still), (HAM(mining_start_epoch=0, mining_step=2), ATTACK)):
        for precision in ("training", "bf16"):
            model = copy.deepcopy(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            what = (model, optimizer, objective, attack, Accelerator(cpu=True))
            step = train_step(*what, class_counts=torch.full((10,), 3), seed=0, attack_precision=precision)
            assert all(value.dtype != torch.bfloat16 for value in model.state_dict().values())
            step([pixel_batch(*batch)], epoch=0, step=0)
            after[objective.name, precision] = model.state_dict()
    for name, value in after["pgd_at", "training"].items():
        assert torch.equal(value, after["pgd_at", "bf16"][name])
    # Of the mined update, the images differ by few values and so do the weights, which shows that bf16 was used.
    coarse, exact = after["ham", "bf16"], after["ham", "training"]
    assert not all(torch.equal(coarse[name], value) for name, value in exact.items() if value.is_floating_point())


def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))


def wrong_share(exact, coarse):
    """Share of each image's gradient whose sign is another one."""
    differs = (exact.sign() != coarse.sign()).float()
    return ((differs * exact.abs()).flatten(1).sum(1) / exact.abs().flatten(1).sum(1)).max()


@pytest.mark.parametrize("size", [1e-15, 1e-9, 1.0, 1e6])
@pytest.mark.parametrize("loss_fn", [cross_entropy, margin_loss])
def test_float16_keeps_the_direction_of_every_image(size, loss_fn):
    """A gradient of 1e-9 is what an image has that the network is sure of; float16 ends at 6e-8 and at 7e4."""
    net = small_net()
    x = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x).topk(2).indices[torch.arange(32), torch.arange(32) % 2]

    def sized(logits, y):
        return size * loss_fn(logits, y)

    def plain(pixels):
        with torch.autocast("cpu", torch.float16):
            return net(pixels).float()

    exact = input_gradient(net, x, y, sized)
    coarse = input_gradient(attack_passes(net, "fp16"), x, y, sized)
    assert coarse.dtype == torch.float32
    assert wrong_share(exact, coarse) < 0.01
    assert (coarse - exact).flatten(1).norm(dim=1).div(exact.flatten(1).norm(dim=1)).max() < 0.02
    lost = ~(input_gradient(plain, x, y, sized).abs().amax((1, 2, 3)) > 0)
    assert lost.all() == (size != 1)


def test_a_row_in_float16_does_not_depend_on_the_others():
    net = attack_passes(small_net(), "fp16")
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8) % 5
    together = input_gradient(net, x, y)
    assert torch.equal(together[3:4], input_gradient(net, x[3:4], y[3:4]))


class Steep(torch.nn.Module):
    """Gradients grow by the square of ``gain`` on the way back, for bright images only, and shrink by 1,024 then."""

    def __init__(self, gain):
        super().__init__()
        self.gain, self.rows = gain, []

    def forward(self, x):
        self.rows.append(len(x))
        gain = torch.where(x.mean((1, 2, 3), keepdim=True) > 0.5, self.gain, 1.0).half()
        return (x.half() / 1024 * gain * gain).flatten(1)[:, :4]


@pytest.mark.parametrize(("gain", "rows"), [(1, [4]), (10, [4, 2]), (100, [4, 2, 2]), (3000, [4, 2, 2])])
def test_what_overflows_in_float16_takes_another_pass_alone(gain, rows):
    net = Steep(float(gain))
    x = torch.cat([torch.full((2, 1, 2, 2), 0.9), torch.full((2, 1, 2, 2), 0.1)])
    y = torch.zeros(4, dtype=torch.long)
    attacked = attack_passes(net, "fp16")
    found = input_gradient(attacked, x, y, lambda logits, y: logits[:, 1])
    assert net.rows == rows
    finite = found.isfinite().flatten(1).all(1)
    assert finite.tolist() == [gain < 3000] * 2 + [True] * 2
    expected = torch.tensor([gain**2, gain**2, 1, 1])[finite] / 1024
    assert torch.allclose(found[finite][:, 0, 0, 1], expected, rtol=1e-3)
    # Nothing left in place but what overflows all the same.
    settings = {"threat_model": ThreatModel("linf", 0.1), "num_steps": 1, "step_size": 0.1, "start": x}
    moved = pgd(attacked, x, y, **settings) != x
    assert moved.flatten(1).any(1).tolist() == finite.tolist()


def test_gradients_of_weights_are_not_scaled_in_float16():
    net = small_net()
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8) % 5
    found = []
    for model in (net, attack_passes(net, "fp16")):
        cross_entropy(model(x), y).sum().backward()
        found.append(net[1].weight.grad.clone())
        net.zero_grad()
    assert torch.allclose(found[0], found[1], rtol=0.05, atol=1e-3)
