"""The loss of one batch for loops of others: its value, its graph, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ham_hf
from ham_hf import ThreatModel, adversarial_loss, mine_hard_examples, pgd
from tests.support.nets import batch_norm_net, group_norm_net, labeled_for

CLOSE = ThreatModel("linf", 1e-6)
ATTACK = {"threat_model": ThreatModel("linf", 0.05), "num_steps": 4, "step_size": 0.02}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_ham_is_the_mean_cross_entropy_of_the_hard_examples(x: torch.Tensor) -> None:
    net = group_norm_net()
    y = labeled_for(net, x, [True, False, True, False, False, True])
    attack = {"threat_model": CLOSE, "num_steps": 4, "mining_step": 2}
    loss, record = adversarial_loss(net, x, y, generator=generator(), **attack)
    mined = mine_hard_examples(net, x, y, step_size=1e-6 / 4, generator=generator(), **attack)
    torch.testing.assert_close(loss, F.cross_entropy(net(mined.x_adv), mined.y))
    assert record.hard_fraction == 0.5
    assert (record.num_examples, record.num_trained_on, record.method) == (6, 3, "ham")
    loss.backward()
    assert all(weight.grad is not None for weight in net.parameters())


def test_easy_examples_count_by_their_weight(x: torch.Tensor) -> None:
    net = group_norm_net()
    y = labeled_for(net, x, [True, False, True, False, False, True])
    loss, record = adversarial_loss(net, x, y, threat_model=CLOSE, num_steps=4, easy_weight=0.5, mining_step=2)
    each = F.cross_entropy(net(x), y, reduction="none")
    weight = torch.tensor([1, 0.5, 1, 0.5, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(loss, (weight * each).sum() / weight.sum(), rtol=1e-4, atol=1e-4)
    assert record.num_trained_on == 6


def test_plain_methods(x: torch.Tensor) -> None:
    net, y = group_norm_net(), torch.arange(6) % 4
    x_adv = pgd(net, x, y, generator=generator(), **ATTACK)
    loss, record = adversarial_loss(net, x, y, method="pgd_at", generator=generator(), **ATTACK)
    torch.testing.assert_close(loss, F.cross_entropy(net(x_adv), y))
    assert record.hard_fraction is None
    clean, _ = adversarial_loss(net, x, y, method="trades", beta=0.0, **ATTACK)
    torch.testing.assert_close(clean, F.cross_entropy(net(x), y))


@pytest.mark.parametrize("method", ["ham", "pgd_at", "trades", "mart", "bat", "fat", "gairat"])
def test_every_method_without_class_state_gives_a_gradient(method: str, x: torch.Tensor) -> None:
    net = batch_norm_net()
    net.train()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    loss, _ = adversarial_loss(net, x, torch.arange(6) % 4, method=method, **ATTACK)
    loss.backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in net.parameters())
    assert net.training
    # One forward in training mode, however many the attack took.
    moved = [int(value - buffers[name]) for name, value in net.named_buffers() if name.endswith("tracked")]
    assert moved == [1, 1]


def test_nothing_hard_gives_a_zero_that_moves_nothing(x: torch.Tensor) -> None:
    net = batch_norm_net()
    y = labeled_for(net, x, [False] * 6)
    net.train()
    buffers = [value.clone() for value in net.buffers()]
    loss, record = adversarial_loss(net, x, y, threat_model=CLOSE, num_steps=4)
    assert (float(loss.detach()), record.num_trained_on, record.hard_fraction) == (0, 0, 0)
    loss.backward()
    assert all(not weight.grad.any() for weight in net.parameters())
    assert all(map(torch.equal, buffers, net.buffers()))


def test_a_single_hard_row_passes_batch_norm(x: torch.Tensor) -> None:
    net = batch_norm_net()
    y = labeled_for(net, x, [False, True, False, False, False, False])
    net.train()
    loss, record = adversarial_loss(net, x, y, threat_model=CLOSE, num_steps=4)
    loss.backward()
    assert record.num_trained_on == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["ham", "trades"])
def test_without_gradients_it_is_the_same_number_without_a_graph(mode: type, method: str, x: torch.Tensor) -> None:
    net, y = group_norm_net(), torch.arange(6) % 4
    expected, _ = adversarial_loss(net, x, y, method=method, generator=generator(), **ATTACK)
    with mode():
        # Made here, so that they are inference tensors, as in a validation step.
        loss, record = adversarial_loss(net, x.clone(), y.clone(), method=method, generator=generator(), **ATTACK)
        assert not loss.requires_grad
        assert torch.equal(loss, expected.detach())
        assert record.num_examples == 6
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())


def test_attacks_work_in_inference_mode(x: torch.Tensor) -> None:
    net, y = group_norm_net(), torch.arange(6) % 4
    x_adv = pgd(net, x, y, generator=generator(), **ATTACK)
    mined = mine_hard_examples(net, x, y, mining_step=2, generator=generator(), **ATTACK)
    with torch.inference_mode():
        inside, labels = x.clone(), y.clone()
        assert torch.equal(pgd(net, inside, labels, generator=generator(), **ATTACK), x_adv)
        assert torch.equal(pgd(net, x, y, start=inside, **ATTACK), pgd(net, x, y, start=x, **ATTACK))
        again = mine_hard_examples(net, inside, labels, mining_step=2, generator=generator(), **ATTACK)
        assert torch.equal(again.x_adv, mined.x_adv)
        assert torch.equal(again.hard, mined.hard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((2, 3, 6, 6), 255.0)}, r"pixels must lie in \[0, 1\], got values from 255"),
        ({"x": torch.zeros(2, 3, 6, 6).sub(0.1)}, r"pixels must lie in \[0, 1\]"),
        ({"y": torch.zeros(2)}, r"class numbers \(int64\), got torch.float32"),
        ({"x": torch.zeros(0, 3, 6, 6), "y": torch.zeros(0, dtype=torch.long)}, "holds no image"),
        ({"method": "HAM"}, "did you mean 'ham'"),
        ({"method": "cfa"}, "keeps state of the classes .* ham_hf.train"),
        ({"method": "wat"}, "keeps state of the classes"),
        ({"class_weighting": "dafa"}, "option class_weighting of method 'ham': .* needs more than this batch"),
        ({"mining_start_epoch": 3}, "a batch has no epoch: call with method='pgd_at'"),
        ({"minig_step": 3}, "option minig_step of method 'ham': expected one of .*mining_step"),
        ({"easy_weight": 2.0}, r"easy_weight 2.0: expected a number in \[0, 1\]"),
        ({"mining_step": 10}, "mining_step 10"),
        ({"num_steps": 0}, "num_steps 0: expected at least 1"),
    ],
)
def test_refused_with_a_reason(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 6, 6), "y": torch.zeros(2, dtype=torch.long), **change}
    net = group_norm_net().float()
    with pytest.raises(ValueError, match=message):
        adversarial_loss(net, arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize(
    ("norm", "epsilon", "message"),
    [
        ("Linf", 0.1, "did you mean linf"),
        ("L2", 0.1, "did you mean l2"),
        ("linf", 8, "did you mean 8/255"),
        ("l1", 0.1, "norm must be one of"),
        ("linf", -0.1, "epsilon must not be negative"),
        ("linf", float("nan"), "epsilon must not be negative"),
    ],
)
def test_impossible_threat_models_are_refused_and_say_what_was_meant(norm: str, epsilon: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreatModel(norm, epsilon)
    assert ham_hf.ThreatModel("l2", 8).epsilon == 8


def _ddp_worker(rank: int, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{results}-store", rank=rank, world_size=2)
    net = group_norm_net()
    x, y = _ddp_batch(net)
    wrapped = nn.parallel.DistributedDataParallel(net)
    loss, _ = adversarial_loss(wrapped, *_rows(x, y, rank), threat_model=CLOSE, num_steps=4)
    loss.backward()
    if rank == 1:  # not on the other one: no process may wait for it
        with torch.no_grad():
            adversarial_loss(wrapped, x, y, threat_model=CLOSE, num_steps=4)
    torch.save([weight.grad for weight in net.parameters()], f"{results}-{rank}")
    torch.distributed.destroy_process_group()


def _ddp_batch(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, labeled_for(net, x, [True, True, True, False, False, False])


def _rows(x: torch.Tensor, y: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    part = slice(0, 4) if rank == 0 else slice(4, 6)
    return x[part], y[part]


@pytest.mark.slow
def test_two_processes_one_without_a_hard_example_make_the_gradient_of_one(tmp_path) -> None:
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path / "grads"),), nprocs=2)
    net = group_norm_net()
    x, y = _ddp_batch(net)
    adversarial_loss(net, x, y, threat_model=CLOSE, num_steps=4).loss.backward()
    for rank in (0, 1):
        for found, weight in zip(torch.load(tmp_path / f"grads-{rank}"), net.parameters(), strict=True):
            torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-5)
