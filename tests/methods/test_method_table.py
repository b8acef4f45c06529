"""Every method with numbers of its authors in one table: their images, loss and gradients; and what all methods share.

What is special to a method is tested in its own file, PGD-AT and HAM also as whole updates in
tests/training/test_train_step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import BAT, CFA, CFOL, DAFA, FAAL, FAT, FRL, GAIRAT, HAM, MART, PGDAT, TRADES, WAT, Method
from ham_hf.methods.bat import BalanceLoss
from ham_hf.methods.class_rule import ClassRule
from ham_hf.methods.losses import MartLoss, TradesLoss
from ham_hf.methods.rule_method import as_recorded
from ham_hf.methods.rules.hard_fraction import HardFraction
from ham_hf.methods.state import named_kinds
from ham_hf.settings import setting_problems
from tests.support.golden_data import exact, golden_batch, golden_net, golden_noise, golden_tensors, starting_at
from tests.support.method_checks import (
    CFA_OPTIONS,
    assert_loss_and_gradients,
    attack_of,
    every_method,
    golden_frl,
    initial_states,
    rows_of,
    update_loss,
)


@dataclass(frozen=True)
class Authors:
    """One method, with the authors' options, against their numbers in a golden file; tolerances are absolute."""

    file: str
    method: Method
    prefix: str = "out/"  # of the numbers in the file
    x_adv: tuple[str, str] | None = None  # golden file and name of the adversarial images
    start: str = "normal"  # noise of the start of the attack
    epoch: int = 0  # 0-based
    # The class state from the file: name of the tensor, and its value.
    state: Callable[[dict], tuple[str, torch.Tensor]] | None = None
    size: int = 16  # of the images in pixels
    x_tolerance: float = 1e-9
    tolerance: float = 1e-9  # of loss and gradients
    step_size: str = "step_size"  # name of the hyper-parameter
    attacks_alike: bool = True  # False where the published attack is another one; loss and gradients are of its images


def hyper_of(file):
    return golden_tensors(file)[1]


def faal(mode, base_loss, **changes):
    """With the weights of the authors' solver; ours are in rules/test_faal.py."""
    return Authors(
        "faal",
        FAAL(base_loss=base_loss, beta=6.0, faal_radius=hyper_of("faal")["r"]),
        f"out/{mode}/",
        state=lambda tensors: ("weight", 10 * tensors[f"out/{mode}/weights_float32"].double()),
        **{"x_adv": ("trades", "out/x_adv"), "step_size": "kl_step_size", **changes},
    )


def frl(variant, **changes):
    """After the held-out errors of the epochs before; the authors round weights to float32."""
    changes |= {"epoch": hyper_of("frl")["loss_epoch"], "x_tolerance": 1e-8, "tolerance": 1e-7}
    return Authors("frl", golden_frl(variant)[0], f"out/{variant}_batch/", **changes)


def gairat(function):
    options = {"gairat_lambda": hyper_of("gairat")["Lambda"], "gairat_start_epoch": 3}
    method = GAIRAT(gairat_function=function.lower(), **options)
    return Authors("gairat", method, f"out/{function}/", ("pgd_at", "out/x_adv"), start="uniform", epoch=3)


def fat(tau):
    method = FAT(fat_tau_epochs=tuple(range(tau)), fat_omega=0.0)
    return Authors("fat", method, f"out/tau{tau}/", start="uniform", epoch=2, size=32)


DAFA_, WAT_ = hyper_of("dafa"), hyper_of("wat")
DAFA_WEIGHTS = f"out/class_weights/{DAFA_['loss_table']}/lambda{DAFA_['loss_lambda']}"
CASES = {
    "trades": Authors("trades", TRADES(beta=6.0)),
    "mart": Authors("mart", MART(beta=5.0)),
    "cfa": Authors(
        "cfa",
        CFA(**CFA_OPTIONS),
        "out/ccm_ccr_trades/",
        epoch=10,
        state=lambda tensors: ("robust_accuracy", tensors["in/class_robust_acc"][0]),
    ),
    "dafa": Authors(
        "dafa",
        DAFA(dafa_start_epoch=1),
        "out/trades/",
        epoch=1,
        state=lambda tensors: ("weight", tensors[DAFA_WEIGHTS]),
    ),
    "wat": Authors(
        "wat",
        WAT(beta=WAT_["beta"], wat_eta=WAT_["eta"]),
        "out/batch/",
        ("trades", "out/x_adv"),
        epoch=4,
        state=lambda tensors: ("weight", tensors["out/weights_after_epoch"][WAT_["loss_epoch"]]),
    ),
    "frl": frl("rw", x_adv=("trades", "out/x_adv")),
    "frl-margin": frl("rw_rm"),
    "faal-pgd_at": faal("AT", "pgd_at", start="uniform", x_adv=None, step_size="step_size"),
    "faal-trades": faal("TRADES", "trades"),
    # The authors attack the KL term here too; ours is the attack of MART, the cross-entropy.
    "faal-mart": faal("MART", "mart", attacks_alike=False),
    **{f"gairat-{function.lower()}": gairat(function) for function in ("Tanh", "Sigmoid", "Discrete")},
    **{f"fat-tau{tau}": fat(tau) for tau in hyper_of("fat")["taus"]},
}


def state_of(case, tensors):
    """Class state of the method when the authors took their numbers."""
    states = initial_states(case.method)
    if case.file == "frl":
        _, epochs = golden_frl("rw_rm" if case.method.frl_margin else "rw")
        states = next(found for epoch, found in epochs if epoch == case.epoch)
    elif case.state is not None:
        name, value = case.state(tensors)
        states[case.method.name][name] = value.clone()
    return states


@pytest.mark.parametrize("label", CASES)
def test_images_loss_and_gradients_are_the_authors(label):
    case = CASES[label]
    tensors, hyper = golden_tensors(case.file)
    count = hyper.get("rows")
    (x, y), noise = golden_batch(count, case.size), golden_noise(case.start, count, case.size)
    net, states = golden_net(), state_of(case, tensors)
    attack = attack_of(hyper, step_size=hyper[case.step_size])
    with starting_at(**{case.start: noise}):
        rows = rows_of(case.method, net, x, y, attack=attack, epoch=case.epoch, states=states)
    # FAT's authors return rows in the order in which they stop.
    order = tensors.get(f"{case.prefix}order", torch.arange(len(y)))
    file, name = case.x_adv or (case.file, f"{case.prefix}x_adv")
    theirs = golden_tensors(file)[0][name][: len(y)]
    assert torch.equal(rows.y, y)
    assert torch.equal(rows.x[len(y) :], x if case.method.loss.paired else x[:0])
    if case.attacks_alike:
        exact(rows.x[order], theirs, case.x_tolerance)
    else:
        assert not torch.allclose(rows.x[: len(y)], theirs)
        rows = replace(rows, x=torch.cat([theirs, x]))
    common = {"epoch": case.epoch, "states": states, "tensors": tensors, "prefix": case.prefix}
    logits = assert_loss_and_gradients(case.method, net, rows, tolerance=case.tolerance, **common)
    for known in {f"{case.prefix}logits_adv", f"{case.prefix}robust_logits"} & tensors.keys():
        exact(logits[: len(y)], tensors[known])
    if f"{case.prefix}weights" in tensors and case.file == "gairat":
        exact(rows.weight / rows.weight.mean(), tensors[f"{case.prefix}weights"])


def fair(states, method):
    """Held-out results in which all classes are alike."""
    method.rule.after_held_out(states["frl"], torch.tensor([[9.0], [7.0], [4.0]]).expand(3, 10).double(), epoch=0)


def unequal(states, method):
    """Margins that differ from class to class."""
    method.rule.before_update(states["faal"], torch.arange(10.0).double())


@pytest.mark.parametrize(
    ("method", "plain", "epoch", "prepare", "factor"),
    [
        (CFA(cfa_margin=False, cfa_regularization=False), TRADES(), 20, None, 1),
        (CFOL(), PGDAT(), 0, None, 1),
        (CFOL(cfol_as="weight"), PGDAT(), 0, None, 1),
        (DAFA(base_loss="pgd_at", dafa_start_epoch=5), PGDAT(), 4, None, 1),
        (DAFA(dafa_start_epoch=5), TRADES(), 4, None, 1),
        (FAAL(base_loss="trades", faal_radius=0.0), TRADES(), 0, unequal, 1),
        (FRL(frl_margin=False, beta=6.0), TRADES(beta=6.0), 0, fair, 1),
        # One weight of the class and one of the average, as published.
        (WAT(base_loss="pgd_at"), PGDAT(), 0, None, 2),
        (GAIRAT(gairat_start_epoch=4), PGDAT(), 3, None, 1),
        (HAM(mining_start_epoch=4), PGDAT(), 3, None, 1),
        (HardFraction(), PGDAT(), 0, None, 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_before_it_begins_a_method_is_its_base_loss(method, plain, epoch, prepare, factor):
    x, y = golden_batch(8)
    attack = attack_of(hyper_of("trades"), num_steps=2)
    losses = []
    for one in (method, plain):
        states, net = initial_states(one), golden_net()
        if prepare is not None and one is method:
            prepare(states, one)
        rows = rows_of(one, net, x, y, attack=attack, epoch=epoch, states=states, seed=1)
        losses.append(update_loss(one, net, rows, epoch=epoch, states=states)[0])
    exact(losses[0], factor * losses[1], 1e-6 if method.name == "faal" else 1e-9)


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        ("cfol", {"log_weight": torch.arange(10.0).double()}),
        ("dafa", {"weight": torch.linspace(0.5, 1.5, 10, dtype=torch.float64)}),
        ("faal", {"weight": torch.linspace(2, 0, 10, dtype=torch.float64)}),
        ("hard_fraction", {"weight": torch.linspace(0.5, 1.5, 10, dtype=torch.float64)}),
        ("wat", {"weight": torch.linspace(0.5, 1.5, 11, dtype=torch.float64)}),
    ],
)
def test_ham_weighs_its_hard_examples_by_the_rule_that_it_borrows(rule, state):
    """The weights themselves are the authors', see above; none of these rules divides by them."""
    ham = HAM(mining_start_epoch=0, mining_step=2, class_weighting=rule)
    ham.check(num_steps=10)
    assert [part.name for part in ham.state_keepers] == ["ham", rule]
    states = initial_states(ham)
    states[rule] |= state
    x, y = golden_batch(64)
    attack = attack_of(hyper_of("trades"))
    rows = rows_of(ham, golden_net(), x, y, attack=attack, epoch=80, states=states, seed=0)
    # Class rules then observe the whole batch at the mining step, as the hard rows say nothing of a class.
    assert torch.equal(rows.early_logits.argmax(1) != y, rows.hard)
    assert 0 < len(rows.y) < len(rows.early_logits) == 64
    of_class = ham.weights.class_weight(states[rule], ham.loss, epoch=80)
    assert of_class.amax() > of_class.amin()
    loss, logits = update_loss(ham, golden_net(), rows, epoch=80, states=states)
    exact(loss, (of_class[0][rows.y] * F.cross_entropy(logits, rows.y, reduction="none")).mean())


@pytest.mark.parametrize("rule", ["cfa", "dafa"])
def test_ham_attacks_with_the_radii_of_the_rule_that_it_borrows(rule):
    ham = HAM(mining_start_epoch=0, mining_step=2, class_margin=rule)
    states = initial_states(ham)
    states[rule][{"cfa": "robust_accuracy", "dafa": "weight"}[rule]] = torch.linspace(0.5, 1, 10, dtype=torch.float64)
    x, y = golden_batch(64)
    attack = attack_of(hyper_of("trades"))
    rows = rows_of(ham, golden_net(), x, y, attack=attack, epoch=80, states=states, seed=0)
    radius, _ = ham.radii.class_attack(states[rule], attack, epoch=80)
    hard = rows.hard.nonzero().squeeze(1)
    moved = (rows.x - x[hard]).abs().flatten(1).amax(1)
    assert (moved <= radius[y[hard]] + 1e-12).all()
    assert (moved > 0.99 * radius[y[hard]]).sum() > len(hard) / 2


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(
    "method",
    [
        BAT(),
        GAIRAT(gairat_start_epoch=0),
        FAT(class_margin="cfa", class_weighting="dafa"),
        FAAL(),
        WAT(base_loss="pgd_at"),
        CFOL(cfol_as="weight"),
    ],
    ids=lambda method: method.name,
)
def test_100_classes_most_of_them_absent_and_no_rows(method, rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 100))
    x, y = torch.rand(rows, 3, 2, 2), torch.arange(rows)
    method.check(num_steps=10)
    states = initial_states(method, 100)
    for part in method.state_keepers:
        part.before_epoch(states[part.name], epoch=70)
    attack = Attack(threat_model=ThreatModel("linf", 0.1), num_steps=3, step_size=0.05)
    found = rows_of(method, net, x, y, attack=attack, epoch=70, states=states)
    weight, divisor = method.weigh(found, epoch=70, states=states)
    losses = method.losses(net(found.x), found)
    assert losses.shape == weight.shape == (method.num_terms, rows)
    assert weight.dtype == torch.float32
    assert torch.isfinite(losses).all()
    assert torch.isfinite(weight).all()
    assert (divisor > 0).all() == (rows > 0)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (BAT, {"beta": -1.0}),
        (CFOL, {"cfol_gamma": 0.0, "cfol_eta": 0.0, "cfol_as": "loss", "cfol_base": "prior"}),
        (FAAL, {"faal_radius": -0.5, "base_loss": "awp"}),
        (FAT, {"fat_omega": -0.1, "fat_tau_epochs": (0.5,)}),
        (FRL, {"frl_limit": 1.0, "frl_bound": -0.1, "frl_rate1": 0.0, "beta": -1.0}),
        (GAIRAT, {"gairat_function": "cosine", "gairat_start_epoch": -1, "gairat_lambda": float("nan")}),
        (HardFraction, {"hard_fraction_high": 1.0}),
        (WAT, {"wat_eta": -0.1, "base_loss": "mart"}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_options_out_of_range_are_refused(kind, wrong):
    assert setting_problems(kind()) == []
    for option, value in wrong.items():
        (problem,) = setting_problems(kind(**{option: value}))
        assert problem.startswith(f"--{option} "), problem
        assert "expected" in problem


@pytest.mark.parametrize("loss", [TradesLoss(), MartLoss(), BalanceLoss()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("size", [90.0, 300.0])
def test_certain_predictions_stay_finite_in_single_and_half_precision(loss, size):
    logits = size * torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]] * 2)
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(dtype).requires_grad_()
        terms = loss.terms(given, torch.zeros(2 if loss.name == "bat" else 3, dtype=torch.long))
        assert terms.dtype == torch.float32
        assert torch.isfinite(terms).all()
        (gradient,) = torch.autograd.grad(terms.sum(), given)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("label", every_method())
def test_what_is_observed_has_one_shape_and_adds_up(label):
    method, _ = every_method()[label]
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
    cfa = CFA(cfa_lambda1=0.3)
    assert [part.name for part in cfa.state_keepers] == ["cfa"]
    assert cfa.radii is cfa.weights is cfa.rule
    assert cfa.rule.cfa_lambda1 == 0.3


def test_a_method_is_settled_when_the_last_of_what_it_does_by_epochs_has_begun():
    assert PGDAT().settled_epoch == 0
    assert HAM(mining_start_epoch=7).settled_epoch == 7
    assert HAM(mining_start_epoch=7, class_weighting="dafa").settled_epoch == 70
    assert FAT(fat_tau_epochs=(3, 9)).settled_epoch == 9
    assert FAT(fat_tau_epochs=()).settled_epoch == 0


BEFORE = {
    "cfa": {
        "cfa_margin": True,
        "cfa_regularization": True,
        "cfa_start_epoch": 10,
        "cfa_lambda1": 0.5,
        "cfa_lambda2": 0.5,
    },
    "cfol": {"cfol_as": "weight", "cfol_gamma": 0.5, "cfol_eta": 1e-05, "cfol_base": "uniform"},
    "dafa": {"dafa_lambda": 1.0, "dafa_start_epoch": 70},
    "faal": {"faal_radius": 0.5},
    "frl": {"frl_margin": True, "frl_bound": 0.07, "frl_rate1": 0.05, "frl_rate2": 0.2, "frl_limit": 0.5},
    "hard_fraction": {
        "hard_fraction_strength": 1.0,
        "hard_fraction_low": 0.7,
        "hard_fraction_high": 1.4,
        "hard_fraction_decay": 0.0,
        "hard_fraction_start_epoch": 0,
    },
    "wat": {"wat_eta": 0.1},
}
"""What the options of borrowed rules were in records that did not tell them."""


def test_a_default_may_change_and_old_records_keep_their_meaning():
    """Where this fails, declare in ``unrecorded`` of the rule what an option was; a new option goes into the table."""
    known = named_kinds(ClassRule)
    assert {name: {**asdict(known[name].lent()), **known[name].unrecorded} for name in BEFORE} == BEFORE
    for name, options in BEFORE.items():
        recorded = as_recorded({"method": "pgd_at", "class_weighting": name, "class_rule_args": {}})
        assert recorded["class_rule_args"] == options
