"""`calibrate` of any model on any loader."""

from __future__ import annotations

import pytest
import timm
import torch

from ham_hf import ThreatModel, calibrate
from ham_hf.evaluation import calibration
from ham_hf.models import PixelModel
from tests.support.nets import group_norm_net


def held_out(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(80, 3, side, side, generator=torch.Generator().manual_seed(1)), torch.arange(80) % 4


def test_calibrated_timm_network_has_the_shifts_in_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NUM_ROUNDS", 2)
    monkeypatch.setattr(calibration, "NUM_WARM_ROUNDS", 1)
    backbone = timm.create_model("resnet18_cifar", num_classes=4, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    model = PixelModel(backbone, (0.5,) * 3, (0.25,) * 3).eval()
    x, y = held_out(8)
    found = calibrate(model, [(x, y)], fairness=1.0, num_steps=1, threat_model=ThreatModel("linf", 0.01))
    assert found.folded
    assert isinstance(found.model, PixelModel)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model(x) + found.shifts, rtol=1e-5, atol=1e-5)
    assert [point.fairness for point in found.frontier] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert "1 (this model)" in str(found)


def test_a_label_without_a_logit_is_refused() -> None:
    for label in (-1, 4):
        x, y = held_out(6)
        y[3] = label
        with pytest.raises(ValueError, match=f"label {label}: the model has 4 logits, 0 to 3|labels must"):
            calibrate(group_norm_net().float(), [(x, y)], num_steps=1)


def test_calibrating_any_other_model_wraps_it_and_0_changes_nothing() -> None:
    net = group_norm_net().float()
    x, y = held_out(6)
    found = calibrate(net, [(x, y)], fairness=0.0, num_steps=1)
    assert not found.folded
    assert not found.shifts.any()
    with torch.no_grad():
        assert torch.equal(found.model(x), net(x))
    with pytest.raises(ValueError, match=r"has 10 and lacks 10.*give the loader more images"):
        calibrate(net, [(x[:40], y[:40])])
