"""Logits and gradients that are not finite are never right and move nothing, in training and evaluation."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ham_hf.attacks import Attack, ThreatModel, cross_entropy, pgd, predicted, unsaturated_cross_entropy
from ham_hf.evaluation import NonFiniteLogitsError, Workplace, evaluate, robustness, standard_attacks
from ham_hf.evaluation.autoattack import evaluate_autoattack
from ham_hf.methods.fat import early_stopped_pgd
from ham_hf.metrics import confusion_matrix, summarize
from ham_hf.mining import mine_hard_examples
from ham_hf.precision import attack_passes
from ham_hf.reporting.run_report import attack_reports
from ham_hf.training.checkpoint import has_best, list_checkpoints
from ham_hf.training.train_step import NonFiniteLossError
from tests.support.exports import SMALL_RESNET, export, preprocessing, trained
from tests.support.nets import TensorImages, group_norm_net
from tests.support.recipe_runs import refused
from tests.support.training import image_data, trainer

NAN, INF = math.nan, math.inf
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture(scope="module")
def place():
    return Workplace(accelerator=Accelerator(cpu=True), batch_size=16, seed=0)


def attacked(net, split, num_steps, step_size, place, threat_model):
    attack = Attack(threat_model=threat_model, num_steps=num_steps, step_size=step_size)
    return evaluate(net, split, standard_attacks(attack), place)


class GivenGradient(nn.Module):
    """Logits of a linear map; the gradient of an image is the row of ``gradients`` that its first pixel counts to."""

    def __init__(self, gradients):
        super().__init__()
        self.gradients = gradients

    def forward(self, x):
        logits = torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)
        if x.requires_grad:
            x.register_hook(lambda gradient: self.gradients.to(gradient))
        return logits


ENTRIES = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-45, -1e-41, 1e-30, 3e38, -1e20, NAN, INF, -INF])


@norms
@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(ENTRIES, min_size=4, max_size=4), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    epsilon=st.floats(0, 1),
    per_example=st.booleans(),
)
def test_whatever_the_gradient_the_result_is_in_the_ball_and_spoiled_rows_stay(norm, rows, seed, epsilon, per_example):
    """And in the box of pixels."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.tensor(rows).view(-1, 1, 2, 2)
    x = torch.rand(gradients.shape, generator=generator)
    radii = epsilon * torch.rand(len(x), generator=generator) if per_example else torch.full((len(x),), epsilon)
    threat = ThreatModel(norm, radii if per_example else epsilon)
    start = threat.random_start(x, generator)
    y = torch.zeros(len(x), dtype=torch.long)
    net = GivenGradient(gradients)
    attack = Attack(threat_model=threat, num_steps=3, step_size=radii / 2)
    stopped = early_stopped_pgd(net, x, y, attack=attack, start=start, loss_fn=cross_entropy, tau=9)
    result = pgd(net, x, y, threat_model=threat, num_steps=3, step_size=radii / 2, start=start)
    for found in (result, stopped.stopped, stopped.last_correct):
        assert ((found >= 0) & (found <= 1)).all()  # False for NaN
        delta = (found - x).flatten(1)
        length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (length <= radii * (1 + 1e-5) + 1e-6).all()
    still = torch.tensor([not all(map(math.isfinite, row)) or not any(row) for row in rows])
    torch.testing.assert_close(result[still], start[still], rtol=1e-5, atol=1e-6)


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_gradients_are_stepped_along_bit_for_bit_as_before(norm, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 5, 5, generator=generator).to(dtype)
    size = torch.logspace(-11, 8, 40).view(-1, 1, 1, 1).to(dtype)
    gradient = size * torch.randn(x.shape, generator=generator).to(dtype)
    length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    expected = (gradient.sign() if norm == "linf" else gradient / length).mul_(0.01).add_(x)
    assert torch.equal(ThreatModel(norm, 1.0).step(x, gradient, 0.01), expected)


@norms
@pytest.mark.parametrize("size", [1e-12, 1e-15, 1e-17, 1e-22, 1e-30, 1e-37, 2e-44, 1e17, 1e25, 3e37])
def test_tiny_and_huge_gradients_keep_their_direction(norm, size):
    whole = torch.tensor([[3.0, -7.0, 0.0, 5.0], [0.0, 0.0, 1.0, 0.0], [-2.0, 2.0, 9.0, -9.0]]).view(3, 1, 2, 2)
    gradient = size * whole
    exact = gradient.double()  # what is left of it: denormal numbers have few digits
    direction = exact.sign() if norm == "linf" else exact / exact.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    move = ThreatModel(norm, 1.0).step(torch.zeros_like(gradient), gradient, 0.25)
    torch.testing.assert_close(move.double(), 0.25 * direction, rtol=1e-5, atol=0)


def test_a_row_with_a_nan_gradient_does_not_hold_up_the_others():
    gradients = torch.ones(3, 1, 2, 2)
    gradients[1, 0, 0, 1] = NAN
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    settings = {"threat_model": ThreatModel("l2", 0.2), "num_steps": 1, "step_size": 0.1}
    moved = pgd(GivenGradient(gradients), x, y, start=x, **settings)
    torch.testing.assert_close(moved - x, torch.tensor([0.05, 0.0, 0.05]).view(3, 1, 1, 1).expand(3, 1, 2, 2))


@settings(max_examples=100)
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, -3.0, 2.0, NAN, INF, -INF]), min_size=3, max_size=3), min_size=1))
def test_prediction_is_the_first_largest_logit_or_none(rows):
    expected = [row.index(max(row)) if all(map(math.isfinite, row)) else -1 for row in rows]
    found = predicted(torch.tensor(rows))
    assert found.tolist() == expected
    assert found.dtype == torch.int64


def test_counts_of_predictions_leave_out_what_is_no_class():
    predictions, labels = torch.tensor([0, -1, 1, -1, 0]), torch.tensor([0, 0, 1, 2, 1])
    assert confusion_matrix(predictions, labels, 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert [entry.correct for entry in summarize(predictions == labels, labels, 3).per_class] == [1, 1, 0]


def exact_direction(logits, y):
    """Gradient of u, the logsumexp of the others minus the label's logit, in float64."""
    others = logits.double().clone()
    others[torch.arange(len(y)), y] = -INF
    gradient = others.softmax(1)
    gradient[torch.arange(len(y)), y] = -1.0
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_attack_loss_of_evaluation_is_plain_but_where_the_probability_rounds_to_one(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(400, 5, generator=generator) * torch.logspace(-1, 3, 400)[:, None]).to(dtype)
    y = torch.where(torch.rand(400, generator=generator) < 0.7, logits.argmax(1), torch.arange(400) % 5)
    found, plain = (logits.clone().requires_grad_(True) for _ in range(2))
    values, expected = unsaturated_cross_entropy(found, y), cross_entropy(plain, y)
    values.sum().backward()
    expected.sum().backward()
    probability = logits.float() if dtype in (torch.bfloat16, torch.float16) else logits
    sure = F.softmax(probability, 1)[torch.arange(400), y].to(dtype) == 1
    assert 50 < sure.sum() < 300
    assert torch.equal(values[~sure], expected[~sure])
    assert torch.equal(found.grad[~sure], plain.grad[~sure])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-9}.get(dtype, 1e-2)
    exact = exact_direction(logits, y)[sure]
    torch.testing.assert_close(found.grad[sure].double(), exact, rtol=tolerance, atol=tolerance)
    assert (plain.grad[sure][torch.arange(int(sure.sum())), y[sure]].abs() < 0.01).all()  # the direction that is lost


class Scaled(nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.factor * self.net(x)


def patterned(count, seed):
    patterns = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % 4
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return 0.35 * patterns[labels] + 0.65 * noise, labels


@pytest.fixture(scope="module")
def trained_net():
    net = group_norm_net().float()
    x, y = patterned(400, 0)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("precision", ["training", "bf16", "fp16"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 0.4)])
def test_a_model_is_no_more_robust_for_being_sure(place, trained_net, monkeypatch, norm, epsilon, precision):
    """Plain cross-entropy gives 25.0, 41.5 and 90.5 % (linf) for the same decisions; 14.0, 37.5 and 91.0 % (l2)."""
    split = TensorImages(*patterned(200, 1))

    def robust(factor):
        attack = Attack(threat_model=ThreatModel(norm, epsilon), num_steps=20, step_size=epsilon / 4)
        net = attack_passes(Scaled(trained_net, factor), precision)
        results = evaluate(net, split, standard_attacks(attack)[:1], replace(place, batch_size=200))
        return float(results["pgd-20"].flags.double().mean())

    unscaled = robust(1)
    assert 0.1 < unscaled < 0.3
    assert [robust(factor) for factor in (40, 1000)] == pytest.approx([unscaled] * 2, abs=0.03)
    monkeypatch.setitem(robustness.LOSSES, "cross-entropy", cross_entropy)
    assert robust(1) == unscaled
    assert robust(40) > unscaled + 0.1
    assert robust(1000) > unscaled + 0.6


class SpoiledWhere(nn.Module):
    """A net whose logits have the given value, or are all NaN, for images that ``where`` picks."""

    def __init__(self, net, where, value=NAN):
        super().__init__()
        self.net, self.where, self.value = net, where, value

    def forward(self, x):
        return torch.where(self.where(x)[:, None], self.value, self.net(x))


def bright(x):
    return x.flatten(1).mean(1) > 0.5


def test_nan_logits_make_an_example_hard():
    net = group_norm_net().eval()
    x = torch.rand(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spoiled = bright(x)
    assert 0 < spoiled.sum() < 8
    # NaN is the largest logit to argmax: class 0.
    y, net = torch.where(spoiled, 0, net(x).argmax(1)), SpoiledWhere(net, bright)
    attack = {"threat_model": ThreatModel("linf", 0.0), "num_steps": 2, "step_size": 0.0, "mining_step": 1}
    for classify_in_step in (False, True):
        mined = mine_hard_examples(net, x, y, classify_in_step=classify_in_step, **attack)
        assert torch.equal(mined.hard, spoiled)
        assert mined.x_adv.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_model_with_logits_that_are_not_finite_is_refused(place, trained_net, tmp_path, value):
    x, labels = patterned(64, 1)
    count = int(bright(x).sum())
    assert 0 < count < 64
    net, split = SpoiledWhere(trained_net, bright, value), TensorImages(x, labels)
    place = replace(place, output_dir=tmp_path)
    for _ in range(2):  # anew, and from what the first evaluation left on the disk
        with pytest.raises(NonFiniteLogitsError, match=rf"on {count} of 64 clean images.*weights are finite"):
            attacked(net, split, 2, 0.01, place, ThreatModel())
    with pytest.raises(NonFiniteLogitsError, match=f"not finite on {count} of 64 clean images"):
        evaluate_autoattack(net, split, place, num_classes=4, threat_model=ThreatModel())


def darkened(x):
    return x.flatten(1).amin(1) < 0.3


def held_above(count=24):
    """Images that no `darkened` picks as they are, while every attack of radius 0.05 can reach it."""
    x, labels = patterned(count, 1)
    return 0.31 + 0.6 * x, labels


@norms
def test_under_attack_logits_that_are_not_finite_are_broken_and_warned_of(
    place, trained_net, norm, caplog, quick_autoattack
):
    x, _ = held_above()
    net = SpoiledWhere(trained_net, darkened)
    with torch.no_grad():
        labels = net(x).argmax(1)
    assert len(labels.unique()) > 1
    assert (labels == 0).any()
    split, epsilon = TensorImages(x, labels), {"linf": 0.05, "l2": 0.6}[norm]
    threat = ThreatModel(norm, epsilon)
    with caplog.at_level(logging.WARNING):
        results = attacked(net, split, 3, epsilon, place, threat)
        results["autoattack"] = evaluate_autoattack(net, split, place, num_classes=4, threat_model=threat)
    assert results["clean"].flags.all()
    for name in ("pgd-3", "cw-3", "autoattack"):
        marked = results[name].predictions == -1
        assert marked.any()
        assert not results[name].flags[marked].any()
        assert f"{name}: the logits of {int(marked.sum())} of 24 images are not finite under attack" in caplog.text
    report = attack_reports(results, 4)["pgd-3"]
    assert sum(map(sum, report.confusion)) == int((results["pgd-3"].predictions >= 0).sum())


def test_autoattack_finds_logits_that_are_not_finite_whatever_the_label(place, quick_autoattack):
    """To argmax NaN is class 0: unguarded, the attacks took such an image of class 0 for one that withstands."""
    x, _ = held_above()
    certain = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        certain[1].weight.zero_()
        certain[1].bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    net, split = SpoiledWhere(certain, darkened), TensorImages(x, torch.zeros(24, dtype=torch.long))
    result = evaluate_autoattack(net, split, place, num_classes=4, threat_model=ThreatModel("linf", 0.3))
    assert not result.flags.any()
    assert (result.predictions == -1).all()


class NaNGradient(nn.Module):
    """Finite logits; the norm of a zero vector has a NaN gradient here."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        zero = (x - x).flatten(1).square().sum(1).sqrt()
        return self.net(x) + zero[:, None]


@norms
def test_a_nan_gradient_breaks_nothing_by_itself(place, trained_net, norm, quick_autoattack):
    x, _ = patterned(24, 1)
    with torch.no_grad():
        labels = trained_net(x).argmax(1)
    split = TensorImages(x, labels)
    net, threat = NaNGradient(trained_net), ThreatModel(norm, 1e-6)
    results = attacked(net, split, 3, 1e-6, place, threat)
    results["autoattack"] = evaluate_autoattack(net, split, place, num_classes=4, threat_model=threat)
    assert all(result.flags.all() for result in results.values())


def spoil(run, name):
    """Let a value of the network become infinite at the end of the first epoch, after the last update."""
    original = run._validate

    def validate(epoch):
        with torch.no_grad():
            run.selected_module.state_dict()[name][0] = INF
        original(epoch)

    run._validate = validate


def test_validation_refuses_logits_that_are_not_finite_and_selects_nothing(tmp_path):
    run = trainer(tmp_path / "run")
    spoil(run, "6.bias")
    with pytest.raises(NonFiniteLossError, match=r"epoch 1 .*64 of 64 held-out images.*6\.bias.*--learning_rate"):
        run.fit()
    assert not has_best(tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert run.progress.history == []


def test_without_held_out_images_weights_that_are_not_finite_are_not_selected(tmp_path):
    run = trainer(tmp_path / "run", data=image_data(validation=False), selection_metric="last")
    spoil(run, "1.running_var")
    with pytest.raises(NonFiniteLossError, match=r"epoch 1 .*weights are not finite \(1\.running_var\)"):
        run.fit()
    assert not has_best(tmp_path / "run")


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    digits = [str(digit) for digit in range(10)]
    export(trained("resnet18_cifar", 8, 1, **SMALL_RESNET), folder, preprocessing(8, 1), class_names=digits)
    return folder


@pytest.mark.parametrize(("name", "value"), [("fc.bias", NAN), ("conv1.weight", INF)])
def test_evaluate_refuses_a_folder_with_one_value_that_is_not_finite(finished_folder, tmp_path, capsys, name, value):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    weights = load_file(finished_folder / "model.safetensors")
    weights[name].view(-1)[weights[name].abs().argmax()] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_bytes((finished_folder / "config.json").read_bytes())
    arguments = ["--dataset_name=digits", "--limit_test_examples=40", f"--output_dir={out}", "--use_cpu"]
    message = refused(capsys, "evaluate.py", str(model), *arguments)
    assert "not finite on 40 of 40 clean images" in message
    assert name in message
    assert not (out / "report.json").exists()
    assert not (out / "EVALUATION.md").exists()
