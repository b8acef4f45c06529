"""Flags of every example under attack: by a loop, repeatable, in the order of the split."""

from __future__ import annotations

import sys

import pytest
import torch
from accelerate import Accelerator

from ham_hf.attacks import Attack, ThreatModel, cross_entropy, margin_loss, pgd
from ham_hf.evaluation import Workplace, evaluate, standard_attacks
from ham_hf.evaluation.autoattack import autoattack_version, evaluate_autoattack
from ham_hf.evaluation.robustness import true_margins
from ham_hf.seeding import Stream, derive_seed, make_generator
from tests.support.golden_data import golden_case, golden_net
from tests.support.nets import TensorImages, group_norm_net

THREAT = ThreatModel("linf", 0.03)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def split():
    case = golden_case("pgd_at")
    return TensorImages(case.x.float(), case.y)


@pytest.fixture(scope="module")
def net():
    return golden_net().float().train()


def run(net, split, accelerator, *, threat=THREAT, seed=4):
    attacks = standard_attacks(Attack(threat_model=threat, num_steps=5, step_size=0.01))
    return evaluate(net, split, attacks, Workplace(accelerator=accelerator, batch_size=10, seed=seed))


def margin_of(logits, y):
    """Logit of the true class minus the largest other one, row by row."""
    rows = zip(logits.detach().tolist(), y.tolist(), strict=True)
    return torch.tensor([row[label] - max(row[:label] + row[label + 1 :]) for row, label in rows])


def test_flags_are_those_of_a_plain_loop(net, split, accelerator):
    results = run(net, split, accelerator)
    assert list(results) == ["clean", "pgd-5", "cw-5"]
    reference = golden_net().float().eval()
    for position, (name, loss_fn) in enumerate([("pgd-5", cross_entropy), ("cw-5", margin_loss)], start=1):
        for number, start in enumerate(range(0, len(split), 10)):
            x, y = split.x[start : start + 10], split.labels[start : start + 10]
            clean = reference(x).argmax(1)
            right = clean == y
            expected, margins = clean.clone(), margin_of(reference(x), y)
            assert torch.equal(results["clean"].margins[start : start + 10], margins)
            if right.any():
                x_adv = pgd(
                    reference,
                    x[right],
                    y[right],
                    threat_model=THREAT,
                    num_steps=5,
                    step_size=0.01,
                    loss_fn=loss_fn,
                    generator=make_generator(torch.device("cpu"), 4, Stream.EVALUATION, position, number),
                )
                expected[right] = reference(x_adv).argmax(1)
                margins[right] = margin_of(reference(x_adv), y[right])
            assert torch.equal(results[name].predictions[start : start + 10], expected)
            assert torch.equal(results[name].margins[start : start + 10], margins)
            assert torch.equal(results[name].flags[start : start + 10], right & (expected == y))
            assert torch.equal(results["clean"].flags[start : start + 10], right)
        assert results[name].flags.sum() < results["clean"].flags.sum()
        assert results[name].settings["epsilon"] == 0.03
        assert results[name].seconds > 0
    assert net.training


def test_logits_that_are_not_finite_have_no_margin():
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[2.0, -1.0, 1.5], [inf, 0, 0], [0, 0, -inf], [nan, 0, 1], [0, 3, 1]])
    for dtype in (torch.float64, torch.bfloat16):
        margins = true_margins(logits.to(dtype), torch.tensor([0, 0, 0, 1, 0]))
        assert margins.dtype == torch.float32
        assert margins.isnan().tolist() == [False, True, True, True, False]
        assert margins[[0, 4]].tolist() == [0.5, -3.0]


def test_evaluation_repeats_and_leaves_the_global_stream_alone(net, split, accelerator):
    state = torch.get_rng_state()
    first, second, other = (run(net, split, accelerator, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name].predictions, second[name].predictions) for name in first)
    assert any(not torch.equal(first[name].predictions, other[name].predictions) for name in ("pgd-5", "cw-5"))


def test_pixels_outside_the_box_and_empty_splits_are_refused(net, split, accelerator):
    normalized = TensorImages((split.x - 0.5) / 0.25, split.labels)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*PixelModel"):
        run(net, normalized, accelerator)
    with pytest.raises(ValueError, match="no example"):
        run(net, TensorImages(split.x[:0], split.labels[:0]), accelerator)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
def test_autoattack_runs_the_authors_attacks_one_after_the_other_on_what_is_left(
    accelerator, num_classes, quick_autoattack
):
    net = group_norm_net(num_classes).float().eval()
    x = torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = net(x).argmax(1)
    labels[::9] = (labels[::9] + 1) % num_classes
    threat = ThreatModel("linf", 0.04)
    result = evaluate_autoattack(
        net,
        TensorImages(x, labels),
        Workplace(accelerator=accelerator, batch_size=16, seed=3),
        num_classes=num_classes,
        threat_model=threat,
    )
    assert not any(parameter.grad is not None for parameter in net.parameters())
    version, attacks, num_targets = autoattack_version(num_classes)
    said = result.settings
    assert (said["version"], said["attacks"], said["subset"]) == (version, attacks, False)
    assert not result.flags[::9].any()
    # An image that withstands was returned as it was; one that falls is on the other side.
    torch.testing.assert_close(result.margins[result.flags], margin_of(net(x), labels)[result.flags])
    assert (result.margins[~result.flags] <= 0).all()
    expected, survivors = net(x).argmax(1), []
    for position, name in enumerate(attacks):
        left = (expected == labels).nonzero().squeeze(1)
        survivors.append(len(left))
        for number, rows in enumerate(left.split(16)):
            seed = derive_seed(3, Stream.AUTOATTACK, position, number) % 2**32
            theirs = quick_autoattack(net, attacks=[name], eps=0.04, norm="Linf", seed=seed, version="custom")
            theirs.apgd.n_restarts = theirs.fab.n_restarts = theirs.apgd_targeted.n_restarts = 1
            theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = num_targets
            _, expected[rows] = theirs.run_standard_evaluation(x[rows], labels[rows], batch_size=16)
    assert torch.equal(result.predictions, expected)
    assert 0 < survivors[-1] < survivors[0]


def test_autoattack_subset_is_stratified_said_to_be_one_and_the_same_for_all_seeds(net, split, accelerator):
    seen = []
    network = golden_net().float()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for seed in (0, 1):
        begun = len(seen)
        result = evaluate_autoattack(
            network,
            TensorImages(split.x, torch.arange(len(split)) % 10),
            Workplace(accelerator=accelerator, batch_size=8, seed=seed),
            num_classes=10,
            threat_model=THREAT,
            num_examples=20,
        )
        assert result.labels.bincount().tolist() == [2] * 10
        assert result.settings["subset"] is True
        assert result.settings["num_examples"] == len(result.flags) == 20
        first = seen[begun]
    assert torch.equal(first, seen[0])


def test_absent_autoattack_names_the_extra(net, split, accelerator, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    place = Workplace(accelerator=accelerator, batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"--autoattack needs.*ham-hf\[autoattack\]"):
        evaluate_autoattack(net, split, place, num_classes=10, threat_model=THREAT)
