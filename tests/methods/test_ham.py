"""HAM: the rows and weights it chooses, and how its passes are arranged: whichever way, the update is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import HAM
from ham_hf.mining import hard_weights, mine_hard_examples
from tests.support.golden_data import exact, golden_batch, golden_case, golden_net
from tests.support.method_checks import attack_of, initial_states, rows_of
from tests.support.nets import group_norm_net
from tests.support.updates import ATTACK as UPDATE_ATTACK, updated

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
    mined = mined_alike(net, case)
    right = mined.early.logits + 99 * torch.nn.functional.one_hot(case.y, mined.early.logits.shape[1])
    for logits, expected in ((right, 1), (right * torch.nan, 2)):
        odd = replace(mined, early=replace(mined.early, logits=logits))
        assert hard_weights(odd, "margin").tolist() == [expected] * len(mined.y)


def test_easy_examples_stay_in_the_box_where_trades_starts(case):
    ham = HAM(mining_start_epoch=0, mining_step=0, easy_weight=1.0, base_loss="trades")
    x = case.x.round()
    batch = rows_of(ham, golden_net(), x, case.y, attack=ATTACK, epoch=5, seed=3)
    assert not batch.hard.all()
    assert 0 <= batch.x.min() < batch.x.max() <= 1


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


def three_batches():
    x, y = golden_batch(30)
    return [(x[part], y[part]) for part in torch.arange(30).split(10)]


@pytest.mark.parametrize(
    "options", [{"hard_weighting": "margin"}, {"class_margin": "cfa"}, {"class_weighting": "dafa"}], ids=str
)
def test_a_packed_update_is_the_update(options, monkeypatch):
    """The net has no batch statistics; a fixed start, as packing attacks the rows in other company."""
    net = golden_net()
    net.eval()
    monkeypatch.setattr(type(net), "train", lambda self, mode=True: self)
    batches = three_batches()
    plain, packed = (
        updated(HAM(mining_start_epoch=0, mining_step=2, pack_hard_examples=pack, **options), net, batches)
        for pack in (False, True)
    )
    assert plain[1].hard == packed[1].hard
    assert packed[1].loss == pytest.approx(plain[1].loss, abs=1e-10)
    for name, value in plain[0].module.state_dict().items():
        exact(packed[0].module.state_dict()[name], value)


def test_price_as_documented():
    """Per image 2 M + 1 + h (2 (K - M) + 3) in the paper's form, 2 M + 4 + 2 h (K - M) with easy examples kept."""
    net, num_steps, mining_step = golden_net(), UPDATE_ATTACK.num_steps, 2
    for easy_weight in (0.0, 1.0):
        ham = HAM(mining_start_epoch=0, mining_step=mining_step, easy_weight=easy_weight)
        _, totals, _ = updated(ham, net, [golden_batch(30)])
        share, rest = totals.hard / 30, 2 * (num_steps - mining_step)
        paper, kept = 2 * mining_step + 1 + share * (rest + 3), 2 * mining_step + 4 + share * rest
        assert 0 < share < 1
        assert totals.passes == pytest.approx(30 * (kept if easy_weight else paper))


def test_packing_fills_the_passes():
    net, batches = golden_net(), three_batches()
    _, totals, rows = updated(HAM(mining_start_epoch=0, mining_step=2, pack_hard_examples=True), net, batches)
    hard = int(totals.hard)
    full, rest = divmod(hard, 10)
    assert rest > 0
    assert 1 <= full < 3
    packed = [10] * full + [rest]
    # Per batch two steps and a classification; per packed batch three steps; then the training passes.
    assert rows == [10] * 9 + [size for size in packed for _ in range(3)] + packed


def test_packing_with_nothing_hard_skips_the_update():
    case, net = golden_case("ham_alleasy"), golden_net()
    attack = attack_of(case.parameters, epsilon=1e-6, num_steps=3)
    ham = HAM(mining_start_epoch=0, mining_step=1, pack_hard_examples=True)
    batches = [(case.x[:5], case.y[:5]), (case.x[5:], case.y[5:])]
    step, totals, _ = updated(ham, net, batches, attack=attack)
    assert totals.updates == totals.hard == 0
    after = step.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("hard_fraction", [0.4, 0.6])
def test_the_next_step_classifies_after_an_epoch_in_which_most_examples_were_hard(hard_fraction):
    net, rows = group_norm_net(), []
    net.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    x = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = net(x).argmax(1).detach()
    y = torch.where(torch.arange(10) < 10 * hard_fraction, (right + 1) % 4, right)
    attack = Attack(threat_model=ThreatModel("linf", 0.0), num_steps=4, step_size=0.1)
    ham = HAM(mining_start_epoch=0, mining_step=1)
    states, hard = initial_states(ham, 4), round(10 * hard_fraction)
    separate, in_step = [10, 10, *[hard] * 3], [10, 10, *[hard] * 2]
    for epoch, expected in enumerate([separate, in_step if hard_fraction > 0.5 else separate]):
        ham.before_epoch(states["ham"], epoch=epoch)
        rows.clear()
        batch = rows_of(ham, net, x, y, attack=attack, epoch=epoch, states=states)
        assert rows == expected
        observed = ham.observe(batch.early_logits, y, epoch=epoch)
        ham.after_update(states["ham"], observed, epoch=epoch)
