"""`evaluate` of any model on any loader."""

from __future__ import annotations

import datasets
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ham_hf import ThreatModel, evaluate, summarize
from ham_hf.api.loader import HeldImages
from ham_hf.attacks import Attack
from ham_hf.evaluation import Workplace, robustness, standard_attacks
from tests.support.nets import batch_norm_net, group_norm_net

ATTACK = {"threat_model": ThreatModel("linf", 0.03), "num_steps": 3}


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(24, 3, 6, 6, generator=generator), torch.arange(24) % 4)


def test_report_has_clean_both_attacks_and_the_verdict_of_each_class(data: TensorDataset) -> None:
    net = group_norm_net().float().train()
    report = evaluate(net, DataLoader(data, batch_size=10), class_names=["a", "b", "c", "d"], **ATTACK)
    x, y = data.tensors
    with torch.no_grad():
        right = net.eval()(x).argmax(1) == y
    assert report.clean.summary == summarize(right, y, 4)
    assert list(report.attacks) == ["pgd-3", "cw-3"]
    flags = {name: report.verdicts.right(name) for name in ("pgd-3", "cw-3")}
    withstood = right & flags["pgd-3"] & flags["cw-3"]
    assert report.verdict is not None
    assert report.verdict.summary == summarize(withstood, y, 4)
    assert report.verdict.intervals is not None
    assert report.verdict.summary.average <= report.attacks["cw-3"].summary.average <= report.clean.summary.average
    text = str(report)
    assert repr(report) == text
    assert "24 images, 4 classes, linf 0.03; percent" in text
    assert [line.split()[0] for line in text.splitlines() if line][1:] == [
        *("Evaluation", "Verdict", "Clean", "PGD-3", "CW-3", "Class", "a", "b", "c", "d")
    ]


@pytest.mark.parametrize(
    ("threat_model", "words"),
    [
        (ThreatModel("l2", 0.5), "l2 0.5;"),
        (ThreatModel("l2", 128 / 255), "l2 128/255;"),
        (ThreatModel("linf", 8 / 255), "linf 8/255;"),
        (ThreatModel("linf", 0.03001), "linf 0.03001;"),
        (ThreatModel("linf", 0.0), "no perturbation;"),
    ],
)
def test_report_says_the_radius_that_was_attacked(data: TensorDataset, threat_model: ThreatModel, words: str) -> None:
    report = evaluate(group_norm_net().float(), [data.tensors], attacks=[], threat_model=threat_model)
    assert f"24 images, 4 classes, {words}" in str(report)


def test_every_kind_of_loader_gives_the_same_numbers_and_leaves_the_model_alone(data: TensorDataset) -> None:
    net = batch_norm_net().float().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = data.tensors
    loaders = [
        DataLoader(data, batch_size=12),
        ((x[rows], y[rows]) for rows in (slice(0, 12), slice(12, 24))),
        [{"pixel_values": x[rows], "labels": y[rows]} for rows in (slice(0, 12), slice(12, 24))],
        HeldImages(x, y),
    ]
    with torch.inference_mode():
        found = [evaluate(net, loader, batch_size=12, **ATTACK) for loader in loaders]
    attack = Attack(step_size=0.03 / 4, **ATTACK)
    place = Workplace(accelerator=Accelerator(cpu=True), batch_size=12, seed=0)
    expected = robustness.evaluate(net, HeldImages(x, y), standard_attacks(attack), place)
    for report in found:
        attacked = report.verdicts.attacked
        assert list(attacked) == ["pgd-3", "cw-3"]
        assert all(torch.equal(values, expected[name].predictions) for name, values in attacked.items())
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())


def test_autoattack_counts_in_the_verdict(data: TensorDataset, quick_autoattack: type) -> None:
    net = group_norm_net().float()
    report = evaluate(net, DataLoader(data, batch_size=24), autoattack=True, attacks=[], threat_model=ThreatModel())
    assert list(report.attacks) == ["autoattack"]
    assert report.verdict is not None
    assert report.verdict.summary == report.attacks["autoattack"].summary


def test_names_come_from_the_dataset_of_the_loader(data: TensorDataset, quick_autoattack: type) -> None:
    data.classes = ["ant", "bee", "cat", "dog"]
    net = group_norm_net().float()
    for autoattack in (False, True):
        found = evaluate(net, DataLoader(data, batch_size=24), attacks=[], autoattack=autoattack)
        assert found.class_names == ("ant", "bee", "cat", "dog")
    assert evaluate(net, [data.tensors], attacks=[]).class_names == ("0", "1", "2", "3")
    del data.classes
    names = {"labels": list("abcd"), "domain": list("wxyz")}
    data.features = {column: datasets.ClassLabel(names=names[column]) for column in names}
    assert evaluate(net, DataLoader(data, batch_size=24), attacks=[]).class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_pixels_of_any_precision_are_those_of_float32(dtype: torch.dtype) -> None:
    net, x, y = group_norm_net().float(), torch.rand(8, 3, 6, 6).half().float(), torch.arange(8) % 4
    found = [evaluate(net, [(pixels, y)], attacks=[]).clean.summary for pixels in (x, x.to(dtype))]
    found.append(evaluate(net.double(), [(x.double(), y)], attacks=[], num_steps=0).clean.summary)
    assert found[0] == found[1] == found[2]
    with pytest.raises(RuntimeError, match="type"):
        evaluate(net.to(torch.bfloat16), [(x, y)], attacks=[])


class _NoLogits(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x.mean((2, 3))}


X, Y = torch.zeros(2, 3, 6, 6), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([(X + 128, Y)], {}, r"pixels must lie in \[0, 1\], got values from 128"),
        ([(X, Y + 4)], {}, r"labels must lie in \[0, 4\), as the model has 4 logits; got 4..4"),
        ([(X, Y.float())], {}, "class numbers"),
        ([X], {}, "a batch must be two tensors"),
        ([{"image": X, "label": Y}], {}, 'a mapping with "pixel_values" and "labels"'),
        ([], {}, "no batch"),
        ([(X, Y)], {"class_names": ["a"]}, "class_names has 1 names, but the model has 4 logits"),
        ([(X, Y)], {"model": _NoLogits()}, "must return logits .* got dict"),
        ([(X, Y)], {"num_steps": 0}, "expected num_steps >= 1 and"),
        ([(X, Y)], {"step_size": -0.1}, "step_size >= 0, got 20, -0.1"),
    ],
)
def test_refused_with_a_reason(loader: list, options: dict, message: str) -> None:
    model = options.pop("model", group_norm_net().float())
    with pytest.raises(ValueError, match=message):
        evaluate(model, loader, **options)
