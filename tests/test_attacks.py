"""Geometry of the threat models, PGD against the authors' numbers, and what an attack must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from ham_hf.attacks import Attack, ThreatModel, cross_entropy, input_gradient, margin_loss, pgd
from ham_hf.methods.fat import early_stopped_pgd
from ham_hf.mining import mine_hard_examples, mine_three_kinds
from tests.support.golden_data import TOLERANCE, golden_case, golden_net

norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def distance(x_adv, x, norm):
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


@norms
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), epsilon=st.floats(0, 2), spread=st.floats(0.01, 10), per_example=st.booleans())
def test_start_and_projection_stay_in_ball_and_box(norm, seed, epsilon, spread, per_example):
    epsilon = min(epsilon, 1.0) if norm == "linf" else epsilon  # more is refused
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 2, 3, 3, generator=generator)
    radii = torch.rand(5, generator=generator) * epsilon if per_example else torch.full((5,), epsilon)
    threat = ThreatModel(norm, radii if per_example else epsilon)
    far = x + spread * torch.randn(x.shape, generator=generator)
    for result in (threat.random_start(x, generator), threat.project(far, x)):
        assert ((result >= 0) & (result <= 1)).all()
        assert (distance(result, x, norm) <= radii * (1 + 1e-5) + 1e-6).all()
    inside = threat.project(far, x)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=1e-6)


@norms
def test_projection_is_the_nearest_point_of_the_ball(norm):
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    far = torch.tensor([[[[0.9, 0.6]]]], dtype=torch.float64)
    nearest = ThreatModel(norm, 0.1).project(far, x)
    grid = torch.linspace(-0.1, 0.1, 401, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(-1, 2)
    allowed = points[points.norm(dim=1) <= 0.1] if norm == "l2" else points
    best = (allowed + 0.5 - far.view(2)).norm(dim=1).min()
    assert (nearest.view(2) - far.view(2)).norm() <= best + 1e-9


def test_l2_random_start_fills_the_ball_uniformly():
    # In d dimensions the share of the ball within radius r is r^d: a normal(-eps, eps) start would not pass.
    x = torch.full((20_000, 1, 1, 2), 0.5)
    start = ThreatModel("l2", 0.1).random_start(x, torch.Generator().manual_seed(0))
    radius = distance(start, x, "l2") / 0.1
    for r in (0.25, 0.5, 0.75):
        assert float((radius <= r).float().mean()) == pytest.approx(r**2, abs=0.015)
    assert (start - x).mean(0).abs().max() < 0.002


@norms
def test_one_step_climbs_most_for_its_length(norm):
    x = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    gradient = torch.randn_like(x)
    threat = ThreatModel(norm, 1.0)
    move = threat.step(x, gradient, 0.01) - x
    assert distance(x + move, x, norm) == pytest.approx([0.01] * 4)
    best = (move * gradient).flatten(1).sum(1)
    for _ in range(50):
        other = threat.project(x + torch.randn_like(x), x) - x
        other = other * 0.01 / distance(x + other, x, norm).view(-1, 1, 1, 1)
        assert ((other * gradient).flatten(1).sum(1) <= best + 1e-12).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_pgd_gives_the_authors_examples(dtype, tolerance):
    case, net = golden_case("pgd_at"), golden_net().to(dtype)
    hyper = case.parameters
    attack = {"threat_model": ThreatModel("linf", hyper["epsilon"]), "start": case.start.to(dtype)}
    attack |= {name: hyper[name] for name in ("num_steps", "step_size")}
    x_adv = pgd(net, case.x.to(dtype), case.y, **attack)
    assert x_adv.dtype == dtype
    torch.testing.assert_close(x_adv.double(), case.out["x_adv"], rtol=0, atol=tolerance)


@norms
def test_a_row_does_not_depend_on_its_batch_and_steps_can_be_split(norm):
    case, net = golden_case("pgd_at"), golden_net()
    epsilon = torch.linspace(0.005, 0.05, len(case.y), dtype=torch.float64)
    threat, rows = ThreatModel(norm, epsilon), torch.tensor([3, 17, 40])
    whole = pgd(net, case.x, case.y, threat_model=threat, num_steps=5, step_size=0.004, start=case.start)
    part, attack = case.start[rows], {"threat_model": threat.rows(rows), "step_size": 0.004}
    for steps in (2, 3):
        part = pgd(net, case.x[rows], case.y[rows], num_steps=steps, start=part, **attack)
    torch.testing.assert_close(part, whole[rows], **TOLERANCE)
    assert (distance(whole, case.x, norm) <= epsilon + 1e-12).all()


ATTACK = Attack(threat_model=ThreatModel(), num_steps=2, step_size=2 / 255)
FLAT = {"threat_model": ATTACK.threat_model, "num_steps": 2, "step_size": ATTACK.step_size}
ATTACKS = {
    "pgd": lambda net, x, y: pgd(net, x, y, start=x, **FLAT),
    "mining": lambda net, x, y: mine_hard_examples(net, x, y, start=x, mining_step=1, **FLAT).x_adv,
    "three kinds": lambda net, x, y: mine_three_kinds(net, x, y, attack=ATTACK, start=x, mining_step=1).x_adv,
    "stopped": lambda net, x, y: (
        early_stopped_pgd(net, x, y, attack=ATTACK, start=x, loss_fn=cross_entropy, tau=1).stopped
    ),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_attacks_leave_modes_buffers_and_gradients_alone(attack):
    net = golden_net().float()
    net.train()
    net.bn2.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    first = attack(net, x, y)
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    net.eval()
    assert torch.equal(first, attack(net, x, y))
    assert not first.requires_grad


def test_attack_computes_only_the_gradient_of_the_input(monkeypatch):
    asked = []
    original = torch.autograd.grad

    def spy(outputs, inputs, *args, **kwargs):
        asked.append(inputs)
        return original(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    net = golden_net().float()
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    pgd(net, x, y, threat_model=ThreatModel(), num_steps=3, step_size=0.01)
    assert len(passes) == len(asked) == 3
    assert all(isinstance(inputs, torch.Tensor) and inputs.shape == x.shape for inputs in asked)


def test_a_compiled_network_computes_no_gradient_of_a_parameter_in_an_attack():
    """Compiled, a backward pass computes the gradients of everything that requires one, asked for or not."""
    masks = []

    def note_gradients(graph, _):
        convolutions = [node for node in graph.graph.nodes if "convolution_backward" in str(node.target)]
        masks.extend(list(node.args[-1]) for node in convolutions)
        return graph

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    net.compile(backend=aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=note_gradients))
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    pgd(net, x, y, threat_model=ThreatModel(), num_steps=1, step_size=0.01)
    assert masks == [[True, False, False]] * 2
    net(x).sum().backward()
    assert masks[2:] == [[True, True, True], [False, True, True]]  # training is compiled anew, with all gradients


def test_modes_and_gradients_are_restored_after_an_error():
    net = golden_net().float().train()
    net.bn2.eval()
    frozen = next(net.parameters()).requires_grad_(False)

    def failing(logits, y):
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert not any(module.training for module in net.modules())
        raise RuntimeError("in mid-attack")

    with pytest.raises(RuntimeError, match="in mid-attack"):
        pgd(net, torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), loss_fn=failing, **FLAT)
    assert [parameter.requires_grad for parameter in net.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert net.training
    assert net.bn1.training
    assert not net.bn2.training


def test_gradient_keeps_the_precision_of_the_pixels_when_the_model_computes_in_bf16():
    net = golden_net().float()
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert input_gradient(net, x, y).dtype == torch.float32
        x_adv = pgd(net, x, y, threat_model=ThreatModel(epsilon=1e-3), num_steps=3, step_size=1e-3)
    assert x_adv.dtype == torch.float32
    assert 5e-4 < (x_adv - x).abs().max() <= 1e-3 + 1e-7


def test_noise_comes_from_the_generator_alone():
    x = torch.rand(3, 1, 4, 4)
    state = torch.get_rng_state()
    for norm in ("linf", "l2"):
        draws = [ThreatModel(norm, 0.1).random_start(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_margin_loss_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margin_loss(logits, torch.tensor([0, 2])).tolist() == [-1.0, 4.0]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(3, 4, 4), torch.arange(3), "N, C, H, W"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.arange(3), "floating-point"),
        (torch.rand(3, 1, 4, 4), torch.arange(2), "one label per image"),
    ],
)
def test_malformed_batches_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        pgd(nn.Identity(), x, y, threat_model=ThreatModel(), num_steps=1, step_size=0.1)


def test_a_scalar_tensor_is_one_radius_for_all():
    threat = ThreatModel(epsilon=torch.tensor(0.1))
    assert threat.rows(torch.tensor([0, 2])).epsilon is threat.epsilon


def test_cross_entropy_is_float32_at_least():
    logits, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert cross_entropy(logits.bfloat16(), y).dtype == torch.float32
    assert cross_entropy(logits.double(), y).dtype == torch.float64


def test_epsilon_must_match_the_batch():
    with pytest.raises(ValueError, match="one value per example"):
        ThreatModel(epsilon=torch.rand(2)).random_start(torch.rand(3, 1, 2, 2))
