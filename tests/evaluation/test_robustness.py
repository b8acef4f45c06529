"""Flags of every example under attack: by a loop, repeatable, in the order of the split."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from ham_hf.attacks import Attack, ThreatModel, cross_entropy, margin_loss, pgd
from ham_hf.evaluation import Workplace, evaluate, standard_attacks
from ham_hf.evaluation.robustness import true_margins
from ham_hf.seeding import Stream, make_generator
from tests.support.golden_data import golden_case, golden_net
from tests.support.nets import TensorImages, margin_of

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
                generator = make_generator(torch.device("cpu"), 4, Stream.EVALUATION, position, number)
                options = {"threat_model": THREAT, "num_steps": 5, "step_size": 0.01, "loss_fn": loss_fn}
                x_adv = pgd(reference, x[right], y[right], generator=generator, **options)
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
