"""Files that plan a comparison: which runs they give, and what is refused before one starts."""

from __future__ import annotations

import re

import pytest

from ham_hf.comparison.plan import read_plan
from tests.conftest import ROOT
from tests.support.recipe_runs import PLAN as TWO_ROWS
from tests.support.recipe_runs import SMALL, refused, write_plan

PLAN = TWO_ROWS + "  fair: {calibrated_from: plain, fairness: 1}\n"


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        ("baseline:", "baselin:", ["line 4", "'baselin'", "did you mean baseline?"]),
        ("mining_step: 2", "mining_stpe: 2", ["run mined", "mining_stpe", "--mining_step"]),
        ("method: pgd_at", "method: pgd_at, mining_step: 1", ["run plain", "--mining_step", "pgd_at"]),
        ("method: pgd_at", "epsilon: 8", ["run plain", "--epsilon 8", "8/255"]),
        ("method: pgd_at", "seeds: [one]", ["run plain: seeds one: expected a list of whole numbers"]),
        ("save_steps: 2", "save_steps: 0", ["run plain", "run mined", "--save_steps 0"]),
        ("save_steps: 2", "seed: 2", ["seed is not for a run", "give seeds to the comparison"]),
        ("save_steps: 2", "push_to_hub: true, hub_model_id: me/x", ["push_to_hub is not for a run", "ham-hf push"]),
        ("save_steps: 2", "save_steps: 2, save_steps: 3", ["save_steps is set a second time"]),
        ("{save_steps: 2}", "[save_steps]", ["settings: expected {setting: value}"]),
        ("seeds: [0, 1]", "seeds: []", ["seeds", "[0, 1, 2]"]),
        ("seeds: [0, 1]", "seeds: [0, 1, 0]", ["seeds 0 1 0: 0 is given twice"]),
        ("seeds: [0, 1]", "seeds: [0, x]", ["seeds 0 x: expected a list of whole numbers"]),
        ("recipe: base.yaml", "recipe: bass.yaml", ["bass.yaml: there is no such file"]),
        ("recipe: base.yaml\n", "", ["recipe is missing"]),
        ("baseline: plain", "baseline: other", ["baseline other", "plain, mined"]),
        ("  plain:", "  ../plain:", ["label '../plain'", "letters"]),
        ("  plain:", "  comparison.md:", ["label 'comparison.md'"]),
        ("  plain:", "  mined:", ["mined is set a second time"]),
        (PLAN[PLAN.index("  plain:") :], "  {}\n", ["runs is empty"]),
        ("from: plain", "from: nobody", ["calibrated_from nobody: expected the label of a row that trains, plain"]),
        ("from: plain", "from: fair", ["calibrated_from fair: expected the label of a row that trains"]),
        (", fairness: 1", "", ["has fairness or max_average_drop"]),
        ("fairness: 1", "fairness: 1, learning_rate: 1", ["not learning_rate"]),
        ("fairness: 1", "fairness: 2", ["--fairness 2: expected"]),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path, capsys, old, new, fragments):
    assert old in PLAN
    complaint = refused(capsys, "compare.py", f"--config={write_plan(tmp_path, PLAN.replace(old, new), SMALL)}")
    for fragment in fragments:
        assert fragment in complaint
    assert not (tmp_path / "out").exists()


def test_a_row_may_have_fewer_seeds(tmp_path):
    plan = PLAN.replace("{method: pgd_at}", "{method: pgd_at, seeds: [1]}")
    runs = read_plan(write_plan(tmp_path, plan, SMALL)).runs
    assert [(run.label, run.seed) for run in runs] == [("mined", 0), ("plain", 1), ("mined", 1), ("fair", 1)]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/compare.yaml")), ids=lambda path: path.parent.name)
def test_plans_of_the_repository_are_accepted(path):
    place = path.relative_to(ROOT).as_posix()
    run = rf"^# Run:      python recipes/compare.py --config {re.escape(place)}( --jobs \d)?$"
    assert re.search(run, path.read_text(), re.MULTILINE)
    plan = read_plan(path)
    assert plan.baseline in plan.labels
    assert len(plan.runs) == 3 * len(plan.labels)
    assert len({run.config.training.num_train_epochs for run in plan.runs}) == 1
    assert all(run.config.method.warmup_epochs < run.config.training.num_train_epochs for run in plan.runs)
