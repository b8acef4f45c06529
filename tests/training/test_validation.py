"""Sums over held-out images on several processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ham_hf.api.evaluation import one_process
from ham_hf.attacks import Attack, ThreatModel
from ham_hf.evaluation import Workplace
from ham_hf.methods import FRL, WAT
from ham_hf.training.validation import HeldOutPart
from tests.support.nets import TensorImages, Watched, group_norm_net

ATTACK = Attack(threat_model=ThreatModel("linf", 0.03), num_steps=2, step_size=0.01)


def sums_of(method, net: nn.Module, *, processes: int, rank: int) -> torch.Tensor:
    place = one_process(torch.device("cpu"))
    place.num_processes, place.process_index = processes, rank
    x = torch.rand(10, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    images = TensorImages(x, torch.arange(10) % 4)
    part = HeldOutPart(images=images, num_classes=4, place=Workplace(accelerator=place, batch_size=4, seed=0))
    return part.sums(method.rule, net, loss=method.loss, attack=ATTACK, epoch=1)


@pytest.mark.parametrize("method", [WAT(), FRL()], ids=lambda method: method.name)
def test_processes_share_the_batches_and_one_without_a_batch_attacks_nothing(method) -> None:
    net = Watched(group_norm_net())
    alone = sums_of(method, net, processes=1, rank=0)
    shared = [sums_of(method, net, processes=5, rank=rank) for rank in range(3)]
    torch.testing.assert_close(sum(shared), alone)
    before = net.passes
    for rank in (3, 4):
        idle = sums_of(method, net, processes=5, rank=rank)
        assert idle.shape == alone.shape
        assert idle.dtype == alone.dtype
        assert not idle.any()
    assert net.passes == before


def test_a_rule_that_takes_other_sums_than_it_says_is_an_error() -> None:
    method = WAT()
    object.__setattr__(method.rule, "num_held_out_sums", 0)
    with pytest.raises(RuntimeError, match="must match the size"):
        sums_of(method, group_norm_net(), processes=1, rank=0)
