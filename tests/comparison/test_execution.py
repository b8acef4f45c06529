"""Rows of a comparison that take their weights from another row's run, and are calibrated."""

from __future__ import annotations

import json

import pytest

from ham_hf.comparison.execution import bring_weights, execute
from ham_hf.comparison.plan import read_plan
from ham_hf.reporting.report import read_report
from tests.support.recipe_runs import HELD_OUT, recipe_module, write_plan

pytestmark = pytest.mark.slow

BASE = [*HELD_OUT, "--num_train_epochs=1", "--mining_start_epoch=0", "--validation_num_steps=1"]
BASE += ["--selection_metric=last"]
PLAN = """
recipe: base.yaml
output_dir: FOLDER
seeds: [0]
baseline: plain
runs:
  fair: {calibrated_from: plain, fairness: 1, calibration_num_steps: 1}
  plain: {method: pgd_at}
"""


def test_takes_the_weights_of_the_same_seed_and_trains_nothing(tmp_path, capsys):
    """The calibrated row is the first of the file, and runs after the one that it takes its weights from."""
    recipe_module("compare.py").main(["--config", str(write_plan(tmp_path, PLAN, BASE))])
    said = capsys.readouterr().out
    assert said.index("done plain seed 0") < said.index("start fair seed 0")
    plain, fair = (tmp_path / "out" / label / "seed0" for label in ("plain", "fair"))
    base, calibrated = read_report(plain), read_report(fair)
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert base.calibration is None
    assert calibrated.calibration.fairness == 1
    assert calibrated.config["method"] == "pgd_at"
    assert (calibrated.training.steps, calibrated.training.seconds) == (base.training.steps, base.training.seconds)
    assert calibrated.training.passes > base.training.passes
    seconds = {row["label"]: row["training_seconds"]["mean"] for row in comparison["rows"]}
    with_search = calibrated.training.seconds + calibrated.calibration.seconds
    assert seconds == {"plain": base.training.seconds, "fair": with_search}
    weights = next((plain / "checkpoint-best").glob("*.safetensors"))
    assert (fair / "checkpoint-best" / weights.name).read_bytes() == weights.read_bytes()
    assert "| fair " in (tmp_path / "out" / "comparison.md").read_text()
    recipe_module("compare.py").main(["--config", str(write_plan(tmp_path, PLAN, BASE))])
    assert "2 runs: 2 done already, 0 to go" in capsys.readouterr().out


def test_without_the_other_run(tmp_path):
    (fair, _) = read_plan(write_plan(tmp_path, PLAN, BASE)).runs
    with pytest.raises(ValueError, match="which is not finished: run that first"):
        bring_weights(fair, fair.weights_from)
    said = []
    failed = execute([fair], None, jobs=1, announce=said.append)
    assert [run.label for run in failed] == ["fair"]
    assert "not finished" in said[0]
