"""A new class rule takes one class and no change elsewhere: CLI, training, state, resuming, report, lending."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from ham_hf.attacks import predicted
from ham_hf.config import config_to_dict, config_to_yaml, load_train_config, parse_train_config
from ham_hf.methods import RadiusRule, WeightRule, available, class_sums, method_of
from ham_hf.reporting.method_text import trained_method
from ham_hf.settings import setting
from tests.faults.same_runs import assert_same_weights
from tests.support.training import ATTACK, resumed, trainer


@pytest.fixture
def made_up():
    """Weighs a class, and widens its radius, by how often it has been seen misclassified."""

    @dataclass(frozen=True, kw_only=True)
    class UnderdogRule(RadiusRule, WeightRule):
        name: ClassVar[str] = "underdog"
        summary: ClassVar[str] = "made up for a test (Nobody, 2026)"

        underdog_gain: float = setting(1.0, "how much failures count", above=0)
        underdog_epochs: tuple[int, ...] = setting((0, 1), "epochs that count", items="EPOCH")

        def check(self, *, num_steps):
            if self.underdog_gain > num_steps:
                raise ValueError(f"--underdog_gain {self.underdog_gain:g}: expected at most --num_steps {num_steps}")

        def initial_state(self, class_counts):
            return {"wrong": torch.zeros_like(class_counts), "share": torch.zeros_like(class_counts)}

        def observe(self, logits, y, *, epoch):
            return class_sums(predicted(logits) != y, y, logits.shape[1])

        def after_update(self, state, sums, *, epoch):
            if epoch in self.underdog_epochs:
                state["wrong"] += sums

        def before_epoch(self, state, *, epoch):
            state["share"] = state["wrong"] / state["wrong"].sum().clamp(min=1)

        def class_attack(self, state, attack, *, epoch):
            factor = 1 + self.underdog_gain * state["share"]
            return factor * attack.threat_model.epsilon, torch.ones_like(factor) * attack.step_size

        def class_weight(self, state, loss, *, epoch):
            return (1 + self.underdog_gain * state["share"]).expand(loss.num_terms, -1)

    underdog = method_of(UnderdogRule)
    yield underdog
    UnderdogRule.name = underdog.name = ""
    del UnderdogRule, underdog
    gc.collect()


def test_its_options_are_flags_and_yaml(made_up, tmp_path, capsys):
    assert available()["underdog"] is made_up
    config = parse_train_config(["--method", "underdog", "--underdog_gain", "1/2"])
    assert config.method == made_up(underdog_gain=0.5)
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    assert load_train_config(tmp_path / "run.yaml") == config
    with pytest.raises(SystemExit):
        parse_train_config(["--method", "underdog", "--underdog_gain", "0"])
    assert "--underdog_gain 0: expected a number > 0" in capsys.readouterr().err
    for words in (["--method", "underdog", "--underdog_gain", "99"],
                  ["--class_margin", "underdog", "--class_rule_args", "underdog_gain=99"]):  # fmt: skip
        with pytest.raises(SystemExit):
            parse_train_config(words)
        assert "--underdog_gain 99: expected at most --num_steps 10" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_train_config(["--help", "all"])
    assert "--method underdog: made up for a test" in capsys.readouterr().out


def test_it_trains_resumes_and_reports_what_it_did(made_up, tmp_path):
    method, settings = made_up(underdog_gain=2.0), {"ema_decay": None, "save_steps": 4}
    whole = trainer(tmp_path / "whole", method, **settings).fit()
    first, last = whole.history[0], whole.history[-1]
    assert first["class_epsilon"] == pytest.approx([ATTACK.threat_model.epsilon] * 4)
    wrong = load_file(tmp_path / "whole/checkpoint-12/method.safetensors")["underdog.wrong"]
    expected = (1 + 2 * wrong / wrong.sum()) * ATTACK.threat_model.epsilon
    assert last["class_epsilon"] == pytest.approx(expected.tolist())
    assert last["class_weight"] is not None
    at_the_end = load_file(tmp_path / "whole/checkpoint-18/method.safetensors")["underdog.wrong"]
    assert torch.equal(at_the_end, wrong)  # as the rule knows the epoch
    trainer(tmp_path / "cut", method, max_steps=8, **settings).fit()
    resumed(tmp_path / "cut", method, **settings).fit()
    names = [f"checkpoint-18/{name}.safetensors" for name in ("model", "method")]
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", *names)


def test_other_methods_can_borrow_from_it(made_up, tmp_path):
    options = ["--method", "ham", "--mining_start_epoch", "1", "--mining_step", "1", "--class_weighting", "underdog"]
    config = parse_train_config([*options, "--class_margin", "underdog", "--class_rule_args", "underdog_gain=3"])
    ham = config.method
    assert ham.state_keepers[1] == made_up(underdog_gain=3).rule
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    assert load_train_config(tmp_path / "run.yaml") == config
    assert trained_method(json.loads(json.dumps(config_to_dict(config)))) == ham
    progress = trainer(tmp_path / "run", ham, ema_decay=None, save_steps=None).fit()
    assert progress.history[1]["class_epsilon"] is not None
