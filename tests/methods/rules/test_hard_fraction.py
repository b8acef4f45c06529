"""Class weights from the hard fraction: the formula, what is counted, when it begins, lending, the report."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ham_hf.comparison.differences import run_settings
from ham_hf.comparison.existing import label_runs
from ham_hf.comparison.pairs import FinishedRun
from ham_hf.config import config_to_dict, config_to_yaml, load_train_config, parse_train_config
from ham_hf.files import CHECKSUMS, write_checksums
from ham_hf.methods import HAM, PGDAT, TRADES
from ham_hf.methods.rules.hard_fraction import HardFraction, HardFractionRule, hard_fraction_weights
from ham_hf.reporting.method_text import combined_with, method_rows
from ham_hf.reporting.report import read_report
from ham_hf.training.checkpoint import list_checkpoints
from tests.conftest import ROOT
from tests.support.comparison_reports import even, run_report
from tests.support.golden_data import golden_batch, golden_net
from tests.support.method_checks import early
from tests.support.training import resumed, trainer
from tests.support.updates import updated

DEFAULTS = {"strength": 1.0, "low": 0.7, "high": 1.4}


def by_hand(wrong, seen, strength, low, high):
    fractions = [a / b for a, b in zip(wrong, seen, strict=True) if b]
    mean = sum(fractions) / len(fractions) if fractions else 0.0
    raw = [
        min(max(1 + 2 * strength * (a / b - mean), low), high) if b else None for a, b in zip(wrong, seen, strict=True)
    ]
    present = [value for value in raw if value is not None]
    return [1.0 if value is None else value * len(present) / sum(present) for value in raw]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1),
    strength=st.floats(0.1, 5),
    low=st.floats(0, 0.99),
    high=st.floats(1.01, 5),
)
def test_weights_by_hand(counts, strength, low, high):
    wrong, seen = (torch.tensor(part, dtype=torch.float64) for part in zip(*counts, strict=True))
    found = hard_fraction_weights(wrong, seen, strength=strength, low=low, high=high)
    assert found.tolist() == pytest.approx(by_hand(wrong.tolist(), seen.tolist(), strength, low, high), abs=1e-12)
    if (seen > 0).any():
        assert float(found[seen > 0].mean()) == pytest.approx(1)
    assert (found[seen == 0] == 1).all()


def test_defaults_are_those_that_were_measured():
    method = HardFraction()
    state = method.rule.initial_state(torch.ones(4, dtype=torch.float64))
    assert method.rule.class_weight(state, method.loss, epoch=0) is None
    wrong, seen = torch.tensor([9.0, 5.0, 1.0, 5.0]).double(), torch.full((4,), 10.0, dtype=torch.float64)
    method.rule.after_update(state, torch.stack([wrong, seen], 1), epoch=0)
    method.rule.before_epoch(state, epoch=1)
    found = torch.tensor([1.4, 1.0, 0.7, 1.0], dtype=torch.float64) * 4 / 4.1
    torch.testing.assert_close(method.rule.class_weight(state, method.loss, epoch=1)[0], 0.8 + 0.2 * found)
    # The counts are those of one epoch: without any, all classes move to equal weights again.
    method.rule.before_epoch(state, epoch=2)
    torch.testing.assert_close(method.rule.class_weight(state, method.loss, epoch=2)[0], 0.84 + 0.16 * found)


@pytest.mark.parametrize(("decay", "swing"), [(0.0, True), (0.5, False), (0.8, False)])
def test_weights_do_not_swing_where_classes_answer_strongly(decay, swing):
    """Classes whose share of wrong examples falls by 0.7 per unit of weight, as those of CIFAR-10 did."""
    rule = HardFractionRule(hard_fraction_decay=decay)
    alone = torch.tensor([0.62, 0.55, 0.5, 0.41], dtype=torch.float64)
    state = rule.initial_state(torch.ones(4, dtype=torch.float64))
    history = []
    for epoch in range(12):
        rule.before_epoch(state, epoch=epoch)
        history.append(state["weight"].clone())
        wrong = alone - 0.7 * (state["weight"] - 1)
        rule.after_update(state, torch.stack([1000 * wrong, torch.full_like(wrong, 1000)], 1), epoch=epoch)
    moved = (history[-1] - history[-2]).abs().max()
    assert (moved > 0.2) if swing else (moved < 0.01)
    if not swing:
        # Where weights rest, they are those that the formula gives for what they bring about.
        rest = 1 + 2 * (wrong - wrong.mean())
        torch.testing.assert_close(history[-1], rest, atol=0.01, rtol=0)
        assert history[-1].argsort().tolist() == [3, 2, 1, 0]


def test_it_begins_when_it_is_told_to_and_counts_the_epoch_before_alone():
    method = HardFraction(hard_fraction_start_epoch=3, hard_fraction_decay=0, base_loss="trades")
    state = method.rule.initial_state(torch.ones(2, dtype=torch.float64))
    logits, y = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 1, 1])
    for epoch in range(4):
        method.rule.before_epoch(state, epoch=epoch)
        weight = method.rule.class_weight(state, method.loss, epoch=epoch)
        assert (weight is not None) == (epoch == 3)
        sums = method.rule.observe(logits if epoch == 2 else -logits, y, epoch=epoch)
        method.rule.after_update(state, sums, epoch=epoch)
    torch.testing.assert_close(weight, torch.tensor([[0.7 / 1.05, 1.4 / 1.05], [1.0, 1.0]]).double())
    assert (method.warmup_epochs, HardFraction().warmup_epochs) == (3, 1)


@pytest.mark.parametrize(
    "objective",
    [
        TRADES(class_weighting="hard_fraction"),
        early(HAM, class_weighting="hard_fraction", base_loss="trades", easy_weight=0.5),
        HardFraction(),
    ],
    ids=lambda objective: f"{objective.name}-{objective.loss.name}",
)
def test_weights_of_a_training(objective, tmp_path):
    objective.check(num_steps=3)
    run = trainer(tmp_path / "run", objective, ema_decay=None, save_steps=None, num_train_epochs=2)
    history = run.fit().history
    weight = run.method_state.states["hard_fraction"]["weight"]
    assert float(weight.mean()) == pytest.approx(1)
    assert float(weight.amax() - weight.amin()) > 0.01
    if not isinstance(objective, HAM):
        assert history[0]["class_weight"] is None
        # The log compares shares of the loss: it is the weight, relative to that of the average example.
        logged = torch.tensor(history[1]["class_weight"], dtype=torch.float64)
        torch.testing.assert_close(logged / logged.mean(), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mines", [False, True])
def test_what_is_counted(mines, monkeypatch):
    """Where the method mines, the whole batch at the mining step; else the rows of the training forward."""
    seen, observe = [], HardFractionRule.observe

    def recorded(self, logits, y, *, epoch):
        seen.append((logits, y))
        return observe(self, logits, y, epoch=epoch)

    monkeypatch.setattr(HardFractionRule, "observe", recorded)
    rule = {"class_weighting": "hard_fraction"}
    objective = HAM(mining_start_epoch=0, mining_step=2, **rule) if mines else PGDAT(**rule)
    x, y = golden_batch(20)
    updated(objective, golden_net(), [(x, y)])
    logits, labels = seen[0]
    assert torch.equal(labels, y)
    assert logits.shape == (20, 10)
    sums = observe(HardFractionRule(), logits, labels, epoch=0)
    for c in range(10):
        rows = [i for i in range(20) if int(y[i]) == c]
        assert sums[c].tolist() == [sum(int(logits[i].argmax()) != c for i in rows), len(rows)]


def test_options_are_lent_and_shown(capsys):
    words = ["--method=pgd_at", "--class_weighting=hard_fraction", "--class_rule_args", "hard_fraction_strength=2"]
    method = parse_train_config(words).method
    assert method.weights == HardFractionRule(hard_fraction_strength=2)
    config = {"method": "pgd_at", "class_weighting": "hard_fraction"}
    assert combined_with(config) == "the class weights of hard_fraction"
    assert ("Class weights", f"hard_fraction: {HardFraction.summary}") in method_rows(config, averaged=False)
    with pytest.raises(SystemExit):
        parse_train_config([*words[:-1], "hard_fraction_power=2"])
    assert "--class_rule_args hard_fraction_power: expected " in capsys.readouterr().err


def test_a_stream_that_does_not_know_its_classes_changes_nothing():
    """A stream gives NaN for how many images a class has; the rule counts what it sees."""
    method = HardFraction(hard_fraction_decay=0)
    state = method.rule.initial_state(torch.full((2,), float("nan"), dtype=torch.float64))
    method.rule.after_update(state, torch.tensor([[3.0, 4.0], [1.0, 4.0]]).double(), epoch=0)
    method.rule.before_epoch(state, epoch=1)
    assert method.rule.class_weight(state, method.loss, epoch=1).tolist() == [pytest.approx([1.4 / 1.05, 0.7 / 1.05])]


DECAY = HardFractionRule().hard_fraction_decay
BORROWED = ["--method=pgd_at", "--class_weighting=hard_fraction"]


def test_every_record_of_a_run_tells_all_options_of_the_rule_that_it_borrows(tmp_path, capsys):
    config = parse_train_config(BORROWED)
    assert config_to_dict(config)["class_rule_args"] == asdict(HardFractionRule())
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    assert f"hard_fraction_decay: {DECAY}" in (tmp_path / "run.yaml").read_text()
    assert parse_train_config([*BORROWED, "--class_rule_args", f"hard_fraction_decay={DECAY}"]) == config
    assert load_train_config(tmp_path / "run.yaml") == config
    # What the file tells is of its rule: without the rule, or with another one, it has to go too.
    file = ["--config", str(tmp_path / "run.yaml"), "--class_weighting=none"]
    with pytest.raises(SystemExit):
        parse_train_config(file)
    assert "--class_rule_args hard_fraction_strength: expected nothing without" in capsys.readouterr().err
    assert parse_train_config([*file, "--class_rule_args"]).method == PGDAT()
    # A whole number counts as the number that it is.
    zero = parse_train_config([*BORROWED, "--class_rule_args", "hard_fraction_decay=0", "hard_fraction_strength=1"])
    told = json.dumps(config_to_dict(zero)["class_rule_args"])
    assert told == json.dumps(asdict(HardFractionRule(hard_fraction_decay=0.0)))


def written(**config):
    return run_report({"clean": even([18] * 10)}, **config)


def test_records_from_before_the_decay_are_of_runs_without_one():
    old = written(method="pgd_at", class_weighting="hard_fraction", class_rule_args={})
    assert old.config["class_rule_args"] == asdict(HardFractionRule(hard_fraction_decay=0))
    own = written(method="hard_fraction", hard_fraction_strength=0.7)
    assert own.config["hard_fraction_decay"] == 0
    assert "hard_fraction_decay" not in written(method="pgd_at", class_weighting="dafa", class_rule_args={}).config
    committed = ROOT / "recipes/cifar10/comparison_medium/runs/k4-hard_fraction-decay-0/seed0"
    assert json.loads((committed / "report.json").read_text())["config"]["class_rule_args"] == {}
    assert read_report(committed).config["class_rule_args"] == old.config["class_rule_args"]


def test_runs_of_the_rule_of_then_and_of_now_are_two_rows_which_name_the_difference():
    def found(source, **args):
        config = config_to_dict(parse_train_config([*BORROWED, f"--output_dir={source}"])) | {"class_rule_args": args}
        report = written(**{name: value for name, value in config.items() if name != "seed"})
        return FinishedRun(label="", seed=0, report=report, source=source)

    now = asdict(HardFractionRule())
    found_runs = label_runs([found("then"), found("zero", hard_fraction_decay=0), found("now", **now)])
    assert [run.label for run in found_runs] == [
        "pgd_at (hard_fraction_decay 0.0)",
        "pgd_at (hard_fraction_decay 0.0)",
        f"pgd_at (hard_fraction_decay {DECAY})",
    ]
    assert "class_rule_args" not in run_settings(found("now", **now).report.config)


def forget_the_decay(folder, method):
    """Write the plan of a version without the option into every checkpoint in ``folder``."""
    for path in list_checkpoints(folder):
        state = json.loads((path / "trainer_state.json").read_text())
        if method.name == "hard_fraction":
            del state["plan"]["hard_fraction.hard_fraction_decay"]
        else:
            state["plan"]["pgd_at.class_rule_args"] = {}
        (path / "trainer_state.json").write_text(json.dumps(state))
        (path / CHECKSUMS).unlink()
        write_checksums(path)


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize(
    ("method", "of_now", "difference"),
    [
        (
            PGDAT(class_weighting="hard_fraction", class_rule_args={"hard_fraction_decay": 0}),
            PGDAT(class_weighting="hard_fraction"),
            f"pgd_at.class_rule_args {{'hard_fraction_decay': 0.0}} -> {{'hard_fraction_decay': {DECAY}}}",
        ),
        (HardFraction(hard_fraction_decay=0), HardFraction(), f"hard_fraction.hard_fraction_decay 0.0 -> {DECAY}"),
    ],
    ids=["borrowed", "own"],
)
def test_a_checkpoint_from_before_the_decay_continues_without_one_alone(tmp_path, method, of_now, difference):
    folder, options = tmp_path / "run", {"max_steps": 8, "save_steps": None}
    trainer(folder, method, **options).fit()
    forget_the_decay(folder, method)
    with pytest.raises(ValueError, match=re.escape(f"other settings: {difference}; resume")):
        resumed(folder, of_now, **options)
    run = resumed(folder, method, **options | {"max_steps": 10})
    assert run.progress.step == 8
    run.fit()
    # The checkpoints that follow tell it.
    with pytest.raises(ValueError, match=re.escape(f"other settings: {difference}; resume")):
        resumed(folder, of_now, **options)


@pytest.mark.faults(quick=True)
def test_a_checkpoint_continues_with_its_default_written_out(tmp_path):
    folder, named = (
        tmp_path / "run",
        PGDAT(class_weighting="hard_fraction", class_rule_args={"hard_fraction_decay": DECAY}),
    )
    trainer(folder, PGDAT(class_weighting="hard_fraction"), max_steps=4).fit()
    assert resumed(folder, named, max_steps=6).progress.step == 4
