"""Files that plan a comparison: which runs they give, and what is refused before one starts."""

from __future__ import annotations

import re

import pytest

from ham_hf.comparison.plan import read_plan
from tests.conftest import ROOT
from tests.support.recipe_runs import PLAN as TWO_ROWS, SMALL, refused, write_plan
from tests.support.tables import cases

PLAN = TWO_ROWS + "  fair: {calibrated_from: plain, fairness: 1}\n"


@pytest.mark.parametrize("row", cases(__file__, "bad_plans.yaml"), ids=str)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path, capsys, row):
    old, new, *fragments = row
    assert old in PLAN
    complaint = refused(capsys, "compare.py", f"--config={write_plan(tmp_path, PLAN.replace(old, new), SMALL)}")
    for fragment in fragments:
        assert fragment in complaint
    assert not (tmp_path / "out").exists()


def test_a_row_may_have_seeds_of_its_own(tmp_path):
    plan = PLAN.replace("{method: pgd_at}", "{method: pgd_at, seeds: [1, 7]}")
    runs = [(run.label, run.seed) for run in read_plan(write_plan(tmp_path, plan, SMALL)).runs]
    assert runs == [("mined", 0), ("plain", 1), ("mined", 1), ("fair", 1), ("plain", 7)]


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
