"""Training methods: options, the rows and weights they choose, and agreement with the authors' training step."""

from __future__ import annotations

import pytest
import torch

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import HAM, PGDAT, available
from ham_hf.mining import mine_hard_examples
from tests.support.golden_data import golden_case, golden_net
from tests.support.method_checks import every_method, exact, rows_of

METHODS = every_method()
ATTACK = Attack(threat_model=ThreatModel("linf", 0.024), num_steps=6, step_size=0.005)


@pytest.fixture
def case():
    return golden_case("ham_m3")


def outer(method, case, epoch=5):
    net = golden_net()
    return net, rows_of(method, net, case.x, case.y, attack=ATTACK, epoch=epoch, seed=3)


def mined_alike(net, case, **options):
    options |= {"threat_model": ATTACK.threat_model, "num_steps": 6, "step_size": 0.005, "mining_step": 2}
    return mine_hard_examples(net, case.x, case.y, generator=torch.Generator().manual_seed(3), **options)


@pytest.mark.parametrize("easy_weight", [0.4, 1.0])
def test_kept_easy_examples_are_the_most_confident(case, easy_weight):
    ham = HAM(mining_start_epoch=0, mining_step=2, easy_weight=easy_weight, easy_fraction=0.3)
    net, batch = outer(ham, case)
    mined = mined_alike(net, case)
    easy = [i for i in range(len(case.y)) if not mined.hard[i]]
    confidence = mined.early.logits.softmax(1).amax(1)
    kept = sorted(easy, key=lambda i: -confidence[i])[: round(0.3 * len(easy))]
    assert len(kept) >= 5
    num_hard = len(mined.y)
    assert torch.equal(batch.x[:num_hard], mined.x_adv)
    assert torch.equal(batch.x[num_hard:], mined.early.x_adv[kept])
    assert batch.y[num_hard:].tolist() == case.y[kept].tolist()
    assert batch.weight.tolist() == [1.0] * num_hard + [easy_weight] * len(kept)
    assert torch.equal(batch.hard, mined.hard)


def test_weight_by_margin(case):
    net, batch = outer(HAM(mining_start_epoch=0, mining_step=2, hard_weighting="margin"), case)
    probabilities = mined_alike(net, case).early.logits.softmax(1)[batch.hard]
    for weight, row, label in zip(batch.weight, probabilities, batch.y, strict=True):
        others = [float(p) for j, p in enumerate(row) if j != label]
        assert float(weight) == pytest.approx(1 + max(others) - float(row[label]))
        assert 1 <= weight <= 2


def test_weight_by_probability_move(case):
    net, batch = outer(HAM(mining_start_epoch=0, mining_step=2, hard_weighting="probability_move"), case)
    move = mined_alike(net, case, track_moves=True).largest_move
    exact(batch.weight, 0.5 + 0.5 * torch.tanh(5 * move - 4), 1e-12)
    assert (batch.weight.argsort() == move.argsort()).all()


def test_rows_without_weight_do_not_break_when_nothing_is_hard():
    easy = golden_case("ham_alleasy")
    some = {"easy_weight": 1, "easy_fraction": 0.3}
    for options in ({"hard_weighting": "margin"}, {"hard_weighting": "probability_move"}, some):
        ham = HAM(mining_start_epoch=0, mining_step=0, **options)
        attack = Attack(threat_model=ThreatModel("linf", 0.0), num_steps=2, step_size=0.001)
        batch = rows_of(ham, golden_net(), easy.x, easy.y, attack=attack)
        assert not batch.hard.any()
        assert len(batch.x) == len(batch.y) == len(batch.weight) == (3 if options is some else 0)


@pytest.mark.parametrize("label", METHODS)
def test_what_is_observed_has_one_shape_and_adds_up(label):
    method, _ = METHODS[label]
    logits, y = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 3, 4, 0, 3])
    for epoch in range(3):
        for part in method.state_keepers:
            parts = (slice(7), slice(4), slice(4, 7), slice(0))
            whole, first, second, nothing = (part.observe(logits[rows], y[rows], epoch=epoch) for rows in parts)
            if whole is not None:
                assert whole.shape == first.shape == second.shape == nothing.shape
                torch.testing.assert_close(first + second, whole)
                assert not nothing.any()


def test_a_method_has_each_class_rule_once():
    ham = HAM(class_margin="dafa", class_weighting="dafa")
    assert ham.radii is ham.weights
    assert [part.name for part in ham.state_keepers] == ["ham", "dafa"]
    assert [rule.name for rule in ham.rules] == ["dafa"]
    assert PGDAT().rules == ()
    cfa = available()["cfa"](cfa_lambda1=0.3)
    assert [part.name for part in cfa.state_keepers] == ["cfa"]
    assert cfa.radii is cfa.weights is cfa.rule
    assert cfa.rule.cfa_lambda1 == 0.3
