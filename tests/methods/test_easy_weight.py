"""Easy examples kept with a weight, three kinds of example, TRADES term by term: against sums written out in float64.

Each update is made in one batch, in three accumulation steps and packed; the oracle knows of no batch at all.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ham_hf.attacks import Attack, ThreatModel, pgd
from ham_hf.methods import HAM, MartLoss, TradesLoss
from ham_hf.mining import mine_three_kinds
from ham_hf.training.train_step import CLEAN_EVERY
from tests.support.golden_data import exact, golden_case, golden_net
from tests.support.method_checks import initial_states, rows_of
from tests.support.nets import group_norm_net
from tests.support.training import trainer
from tests.support.updates import updated

K, M, BETA = 5, 2, 3.0
SPLITS = {"one batch": [24], "uneven": [4, 13, 7], "packed": [8, 8, 8]}
ATTACK = Attack(threat_model=ThreatModel("linf", 0.06), num_steps=K, step_size=0.01)


@pytest.fixture
def case(monkeypatch):
    """A network, and images of which some are wrong at the start of every attack, some turn wrong, some stay right."""
    net = group_norm_net()
    torch.manual_seed(1)
    x = torch.rand(24, 3, 8, 8, dtype=torch.float64)
    y = net(x).argmax(1)
    y[::4] = (y[::4] + 1) % 4
    noise = torch.linspace(-0.02, 0.03, x[0].numel(), dtype=torch.float64).view(x[0].shape)
    monkeypatch.setattr(ThreatModel, "random_start", lambda self, x, generator=None: x + noise)
    monkeypatch.setattr(TradesLoss, "start", lambda self, x, threat_model, generator: x + noise)
    return net, x, y, x + noise


def attacked(net, x, y, start, base_loss, num_steps):
    """The iterate after some steps, by the attack of the loss."""
    clean = net(x).detach().softmax(1)
    kl = lambda logits, labels: F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)  # noqa: E731
    loss_fn = {"loss_fn": kl} if base_loss == "trades" else {}
    common = {"threat_model": ATTACK.threat_model, "step_size": ATTACK.step_size, "start": start}
    return pgd(net, x, y, num_steps=num_steps, **common, **loss_fn)


def expected_loss(net, case, base_loss, w, *, kinds, of_class=None):
    """The loss of the update, example by example; how many there are of each kind."""
    _, x, y, start = case
    early, full = (attacked(net, x, y, start, base_loss, steps) for steps in (M, K))
    of_class = of_class if of_class is not None else [1.0] * 4
    first, second, weight, counted = [], [], [], [0, 0, 0]
    for i in range(len(y)):
        wrong_at_start = bool(net(start[i : i + 1]).argmax() != y[i])
        wrong_at_m = bool(net(early[i : i + 1]).argmax() != y[i])
        kind = 0 if kinds and wrong_at_start else 1 if wrong_at_m else 2
        counted[kind] += 1
        image = full[i : i + 1] if kind == 1 else early[i : i + 1]
        label = y[i : i + 1]
        robust = net(image)
        weight.append(w if kind == 2 else 1.0)
        if base_loss == "pgd_at":
            first.append(F.cross_entropy(robust, label))
            second.append(torch.zeros((), dtype=torch.float64))
        elif base_loss == "trades":
            p, q = net(x[i : i + 1]).log_softmax(1), robust.log_softmax(1)
            first.append(F.cross_entropy(net(x[i : i + 1]), label))
            second.append(BETA * (p.exp() * (p - q)).sum())
        else:
            terms = MartLoss().terms(torch.cat([robust, net(x[i : i + 1])]), label)[:, 0]
            first.append(terms[0])
            second.append(BETA * terms[1])
    own = [of_class[int(label)] for label in y]
    if base_loss == "trades":
        total = sum(c * a + b * v for c, a, b, v in zip(own, first, second, weight, strict=True))
        return total / len(y), counted
    total = sum(v * (c * a + b) for c, a, b, v in zip(own, first, second, weight, strict=True))
    return total / sum(weight), counted


def ham_of(base_loss="pgd_at", split=None, **options):
    beta = {} if base_loss == "pgd_at" else {"beta": BETA}
    options |= {"base_loss": base_loss, "pack_hard_examples": split == "packed", **beta}
    return HAM(mining_start_epoch=0, mining_step=M, **options)


def update_of(method, case, sizes, **options):
    """An `updated` copy; by default not by update 0, which also looks at the clean images."""
    batches = zip(case[1].split(sizes), case[2].split(sizes), strict=True)
    return updated(method, case[0], batches, **{"number": 1, "attack": ATTACK, "num_classes": 4, **options})


def assert_is(case, found, loss):
    step, totals, _ = found
    assert totals.loss == pytest.approx(loss.item(), abs=1e-10)
    gradients = torch.autograd.grad(loss, list(case[0].parameters()))
    for old, new, gradient in zip(case[0].parameters(), step.module.parameters(), gradients, strict=True):
        exact(old - new, gradient)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kinds", [False, True], ids=["two kinds", "three kinds"])
@pytest.mark.parametrize("w", [0.0, 0.4])
@pytest.mark.parametrize("base_loss", ["pgd_at", "trades", "mart"])
def test_an_update_is_the_sum_over_its_examples(case, base_loss, w, kinds, split):
    ham = ham_of(base_loss, split, easy_weight=w, stop_misclassified=kinds)
    ham.check(num_steps=K)
    loss, counted = expected_loss(case[0], case, base_loss, w, kinds=kinds)
    assert min(counted[1:]) >= 2
    assert (counted[0] >= 3) == kinds
    found = update_of(ham, case, SPLITS[split])
    assert found[1].hard == counted[0] + counted[1]
    assert_is(case, found, loss)
    assert not ham.depends_on_split


@pytest.mark.parametrize("split", ["uneven", "packed"])
@pytest.mark.parametrize("base_loss", ["pgd_at", "trades", "mart"])
def test_class_weights_of_the_hard_fraction_weigh_the_first_term_and_divide_nothing(case, base_loss, split):
    """Class 3 was not seen in the epoch before, and class 2 is not in this update."""
    net, x, y, start = case
    case = (net, x, torch.where(y == 2, 1, y), start)
    ham = ham_of(base_loss, split, easy_weight=0.4, class_weighting="hard_fraction")

    def prepare(step):
        state = step.method_state.states["hard_fraction"]
        state["counts"] = torch.tensor([[9, 10], [5, 10], [2, 20], [0, 0]], dtype=torch.float64)
        ham.weights.before_epoch(state, epoch=1)

    mean = (0.9 + 0.5 + 0.1) / 3
    raw = [min(1.4, 1 + 2 * (0.9 - mean)), 1 + 2 * (0.5 - mean), max(0.7, 1 + 2 * (0.1 - mean))]
    # A part of a weight is kept from epoch to epoch, and all begin at 1.
    kept = ham.weights.hard_fraction_decay
    of_class = [kept + (1 - kept) * 3 * value / sum(raw) for value in raw] + [1.0]
    loss, _ = expected_loss(net, case, base_loss, 0.4, kinds=False, of_class=of_class)
    assert_is(case, update_of(ham, case, SPLITS[split], epoch=1, prepare=prepare), loss)


@pytest.mark.parametrize("split", ["even", "packed"])
@pytest.mark.parametrize("kinds", [False, True], ids=["two kinds", "three kinds"])
def test_packing_packs_the_attack_alone_where_all_rows_are_trained_on(case, kinds, split):
    _, counted = expected_loss(case[0], case, "pgd_at", 1.0, kinds=kinds)
    *_, rows = update_of(ham_of("pgd_at", split, easy_weight=1.0, stop_misclassified=kinds), case, [8, 8, 8])
    # Per batch two steps and a classification, then three steps of the hard rows; training passes of whole batches.
    assert rows[-3:] == [8, 8, 8]
    if split == "packed":
        full, rest = divmod(counted[1], 8)
        sizes = [8] * full + ([rest] if rest else [])
        assert rows[:-3] == [8] * 9 + [size for size in sizes for _ in range(K - M)]
    else:
        assert sum(rows[:-3]) == 8 * 9 + counted[1] * (K - M)


def test_trades_trains_on_no_adversarial_image_of_a_dropped_example(case):
    ham, (net, x, y, _) = ham_of("trades"), case
    batch = rows_of(ham, net, x, y, attack=ATTACK, epoch=0, states=initial_states(ham, 4))
    hard = int(batch.hard.sum())
    assert 0 < hard < len(y)
    assert len(batch.x) == hard + len(y)
    assert torch.equal(batch.x[hard:], x)
    assert torch.equal(batch.adversarial_y, y[batch.hard])


def test_trades_with_nothing_hard_still_trains_on_the_clean_images(case):
    net, x, _, start = case
    y = net(x).argmax(1)
    ham = HAM(mining_start_epoch=0, mining_step=1, base_loss="trades")
    still = Attack(threat_model=ThreatModel("linf", 1e-9), num_steps=2, step_size=1e-9)
    _, totals, _ = update_of(ham, (net, x, y, start), [len(y)], attack=still)
    assert (totals.hard, totals.updates) == (0, 1)
    assert totals.loss == pytest.approx(F.cross_entropy(net(x), y).item(), abs=1e-12)


def test_three_kinds_make_no_pass_that_they_do_not_need(case):
    net, x, y, start = case
    _, counted = expected_loss(net, case, "pgd_at", 1.0, kinds=True)
    rows = []
    net.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    with pytest.raises(ValueError, match=r"mining_step must lie in 1\.\.num_steps"):
        mine_three_kinds(net, x, y, attack=ATTACK, mining_step=0, start=start)
    mined = mine_three_kinds(net, x, y, attack=ATTACK, mining_step=M, start=start)
    assert rows == [24] * (M + 1) + [counted[1]] * (K - M)
    assert torch.equal(mined.wrong_at_start, net(start).argmax(1) != y)
    assert len(mined.attacked) == counted[1]
    assert len(mined.rows) == counted[0] + counted[1]
    assert not mined.wrong_at_start[mined.attacked].any()


def test_what_is_wrong_at_the_start_and_right_at_the_mining_step_stays_of_the_first_kind():
    """A loss that the attack lowers: it makes right what was wrong."""
    case, net = golden_case("ham_m3"), golden_net()
    down = lambda logits, labels: -F.cross_entropy(logits, labels, reduction="none")  # noqa: E731
    x, y = case.x[:20], (net(case.x[:20]).argmax(1) + torch.arange(20) % 2) % 10
    attack = Attack(threat_model=ThreatModel("linf", 0.2), num_steps=8, step_size=0.05)
    mined = mine_three_kinds(net, x, y, attack=attack, mining_step=4, start=x, loss_fn=down)
    mended = mined.wrong_at_start & (mined.early.logits.argmax(1) == y)
    assert mended.any()
    assert torch.equal(mined.hard, mined.wrong_at_start | (mined.early.logits.argmax(1) != y))
    assert torch.equal(mined.x_adv, mined.early.x_adv[mined.hard])


def test_shares_of_the_kinds_are_logged_for_each_class_and_beside_them_what_is_wrong_when_clean(case):
    net, x, y, start = case
    step, *_ = update_of(ham_of(stop_misclassified=True), case, [8, 8, 8], number=0)
    early = attacked(net, x, y, start, "pgd_at", M)
    wrong = net(start).argmax(1) != y
    later = net(early).argmax(1) != y
    kinds = {"start_wrong": wrong, "turned_wrong": ~wrong & later, "stayed_right": ~wrong & ~later}
    kinds["clean_wrong"] = net(x).argmax(1) != y
    record = step.method_state.epoch_record(step.method_state.log, ATTACK, epoch=0)
    for name, mask in kinds.items():
        assert record[f"{name}_fraction"] == pytest.approx(mask.double().mean().item()), name
        expected = [mask[y == c].double().mean().item() if (y == c).any() else None for c in range(4)]
        assert record[f"{name}_per_class"] == pytest.approx(expected), name
    step, *_ = update_of(ham_of(), case, [24])
    assert "start_wrong_fraction" not in step.method_state.epoch_record(step.method_state.log, ATTACK, epoch=0)


def test_the_history_has_the_shares_of_mining_epochs(tmp_path):
    ham = HAM(mining_start_epoch=1, mining_step=1, stop_misclassified=True, easy_weight=1.0)
    warm, *mining = trainer(tmp_path / "run", ham, ema_decay=None, save_steps=None).fit().history
    assert warm["start_wrong_fraction"] is None
    for record in mining:
        shares = [record[f"{name}_fraction"] for name in ("start_wrong", "turned_wrong", "stayed_right")]
        assert sum(shares) == pytest.approx(1)
        assert record["hard_fraction"] == pytest.approx(shares[0] + shares[1])
    # Updates 0 and 16 look at clean images; the first of them is in the warm-up, 6 updates an epoch.
    assert CLEAN_EVERY == 16
    assert [record["clean_wrong_fraction"] is not None for record in mining] == [False, True]
