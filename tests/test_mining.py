"""HAM's mining against the authors' numbers, by its definition, and by the passes it makes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ham_hf.attacks import ThreatModel, pgd
from ham_hf.mining import mine_hard_examples
from tests.support.golden_data import TOLERANCE, Normalized, golden_case, golden_net

CASES = ["ham_m1", "ham_m3", "ham_m5", "ham_mK", "ham_norm", "ham_recross", "ham_alleasy"]


def model_of(case):
    net = golden_net()
    return Normalized(net, case.parameters["mean"], case.parameters["std"]) if case.parameters["normalize"] else net


def mine(model, case, **changes):
    hyper = case.parameters
    settings = {"threat_model": ThreatModel("linf", hyper["epsilon"]), "start": case.start}
    settings |= {"mining_step": hyper["classify_step"], **{name: hyper[name] for name in ("num_steps", "step_size")}}
    return mine_hard_examples(model, case.x, case.y, **settings | changes)


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_mining_gives_the_authors_mask_and_examples(name, in_step):
    case = golden_case(name)
    mined = mine(model_of(case), case, classify_in_step=in_step)
    if name == "ham_alleasy":
        assert not mined.hard.any()
        assert mined.x_adv.shape == (0, 3, 16, 16)
        assert mined.y.shape == (0,)
        torch.testing.assert_close(mined.early.x_adv, case.out["x_adv_returned"], **TOLERANCE)
        return
    assert torch.equal(mined.hard, case.out["hard_mask"].bool())
    assert torch.equal(mined.hard.nonzero().squeeze(1), case.out["hard_index"])
    assert torch.equal(mined.y, case.y[mined.hard])
    if "x_adv_hard" in case.out:
        torch.testing.assert_close(mined.x_adv, case.out["x_adv_hard"], **TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(mining_step=st.integers(0, 6), norm=st.sampled_from(["linf", "l2"]), per_example=st.booleans())
def test_mining_is_pgd_a_mask_and_pgd(mining_step, norm, per_example):
    case, net = golden_case("ham_m3"), golden_net()
    x, y, start = case.x[:12], case.y[:12], case.start[:12]
    spread = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    epsilon = 0.02 * spread if per_example else 0.02
    step_size = 0.004 * spread if per_example else 0.004
    common = {"step_size": step_size, "threat_model": ThreatModel(norm, epsilon)}
    mined = mine_hard_examples(net, x, y, num_steps=6, mining_step=mining_step, start=start, **common)
    early = pgd(net, x, y, num_steps=mining_step, start=start, **common)
    full = pgd(net, x, y, num_steps=6, start=start, **common)
    hard = net(early).argmax(1) != y
    assert torch.equal(mined.hard, hard)
    torch.testing.assert_close(mined.x_adv, full[hard], **TOLERANCE)


def test_mining_makes_no_pass_that_the_algorithm_does_not_need():
    case, net = golden_case("ham_m3"), golden_net()
    rows = []
    net.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    mined = mine(net, case)
    batch, hard = len(case.y), int(mined.hard.sum())
    assert rows == [batch] * 3 + [batch] + [hard] * 7
    rows.clear()
    mine(net, golden_case("ham_alleasy"))
    assert rows == [10] * 4
    rows.clear()
    mine(net, case, classify_in_step=True)
    assert rows == [batch] * 4 + [hard] * 6


@pytest.mark.parametrize("in_step", [False, True])
def test_moves_are_the_same_whichever_pass_classifies(in_step):
    case, net = golden_case("ham_m3"), golden_net()
    found = mine(net, case, track_moves=True, classify_in_step=in_step)
    expected = mine(net, case, track_moves=True)
    torch.testing.assert_close(found.largest_move, expected.largest_move, **TOLERANCE)
    torch.testing.assert_close(found.early.logits, expected.early.logits, **TOLERANCE)
    torch.testing.assert_close(found.early.x_adv, expected.early.x_adv, **TOLERANCE)


def test_largest_move_by_a_loop():
    case, net = golden_case("ham_m3"), golden_net()
    rows = slice(0, 16)
    x, y, start = case.x[rows], case.y[rows], case.start[rows]
    attack = {"threat_model": ThreatModel("linf", 0.024), "step_size": 0.005, "start": start}
    mined = mine_hard_examples(net, x, y, num_steps=5, mining_step=2, track_moves=True, **attack)
    iterates = [pgd(net, x, y, num_steps=k, **attack) for k in range(5)]
    probabilities = [net(iterate).softmax(1) for iterate in iterates]
    moves = [(b - a).abs().sum(1) for a, b in itertools.pairwise(probabilities)]
    expected = torch.stack(moves).amax(0)[mined.hard]
    assert len(expected) > 3
    torch.testing.assert_close(mined.largest_move, expected, **TOLERANCE)
    assert mine(net, case).largest_move is None


@pytest.mark.parametrize("mining_step", [-1, 11])
def test_mining_step_must_lie_within_the_attack(mining_step):
    with pytest.raises(ValueError, match=r"0\.\.num_steps=10"):
        mine(golden_net(), golden_case("ham_m3"), mining_step=mining_step)
