"""The files of a comparison: the same numbers in each, names as text, no path of this machine."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import pytest

from ham_hf.comparison.report import comparison_csv, comparison_json, comparison_markdown, write_comparison
from ham_hf.comparison.table import MissingRun, compare
from ham_hf.reporting.formats import public_word
from tests.support.comparison_reports import CLEAN, METRICS, by_seeds, even, markdown_tables, run
from tests.support.documents import changed
from tests.support.tables import cases


def test_json_and_csv_agree():
    runs = [*by_seeds("base", [10, 12, 4], [11, 13, 6]), *by_seeds("own", [12, 12, 8], [12, 13, 9], seconds=30.0)]
    comparison = compare(runs, baseline="base")
    values = json.loads(comparison_json(comparison, command="x"))
    lines = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    places = [f"{line['label']} {line['evaluation']}" for line in lines]
    assert places == ["base clean", "base pgd-20", "own clean", "own pgd-20"]
    for line in lines:
        row = next(row for row in values["rows"] if row["label"] == line["label"])
        numbers = row["attacks"][line["evaluation"]]
        for metric in (*METRICS, "nsd"):
            assert float(line[f"{metric}_mean"]) == numbers[metric]["mean"]
            assert float(line[f"{metric}_std"]) == numbers[metric]["std"]
        assert float(line["rho"]) == numbers["rho"]
        assert float(line["training_seconds_mean"]) == row["training_seconds"]["mean"]
        assert float(line["peak_memory_bytes_mean"]) == row["peak_memory_bytes"]["mean"] == 6e8


def test_attack_that_a_run_lacks_has_fewer_seeds():
    with_attack = run("own", {"clean": CLEAN, "autoattack": even([5] * 10)}, seed=0)
    comparison = compare([with_attack, run("own", {"clean": CLEAN}, seed=1), run("other", {"clean": CLEAN})])
    tables = markdown_tables(comparison_markdown(comparison, command="x"))
    assert tables["AutoAttack"][1][:3] == ["own", "1", "25.0"]
    assert tables["AutoAttack"][2] == ["other", "0", *["–"] * 4]
    assert tables["Clean"][1][1] == "2"
    assert comparison.strongest_shared_attack() is None


def test_hostile_texts_stay_text(tmp_path):
    label = "a | <b> `c` **d**\n# e"
    hostile = by_seeds(label, [10, 12, 4], [10, 12, 5])
    written = write_comparison(compare(hostile, baseline=label), tmp_path, command="x `y`\nz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.csv", "comparison.json", "comparison.md"]
    text = (tmp_path / "comparison.md").read_text()
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    assert "<b>" not in text
    assert all(len(row) == 7 for row in markdown_tables(text)["PGD-20"])
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == [
        "# Comparison", "## Clean", "## PGD-20", "## Cost", "## How to read this",
        "## What the rows share, and what not", "## Settings in which the rows differ",
    ]  # fmt: skip
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["label"] == label


def test_no_cell_of_the_csv_is_a_formula():
    first = run('=HYPERLINK("x")', {"clean": CLEAN})
    results = {"clean": first.report.results["clean"], "@sum\n(1)": first.report.results["clean"]}
    first = dataclasses.replace(first, report=dataclasses.replace(first.report, results=results))
    (clean, other) = csv.DictReader(io.StringIO(comparison_csv(compare([first]))))
    assert clean["label"] == '\'=HYPERLINK("x")'
    assert other["evaluation"] == "'@sum (1)"


def test_no_path_of_this_machine_is_written(tmp_path):
    place = tmp_path / "John Smith"
    (place / "runs" / "own" / "seed0").mkdir(parents=True)
    runs = [
        *by_seeds("own", [5] * 3, dataset_name=str(place / "cats"), model_args={"weights": str(place / "w.pt")}),
        *by_seeds("other", [5] * 3),
    ]
    runs[0] = dataclasses.replace(
        changed(runs[0], dataset={"name": str(place / "cats")}, model={"base_model": str(place / "start")}),
        source=str(place / "runs" / "own" / "seed0"),
    )
    reason = f"status 1:\n  File \"{place}/train.py\", line 3\n  no such file: '{place}/x y'"
    reason += f"; {tmp_path}/z:4: at /srv/me/q"
    missing = MissingRun(label="own", seed=1, reason=reason, state="failed")
    command = "python recipes/compare.py x"
    write_comparison(compare(runs, missing=[missing]), place / "out", command=command)
    for path in (place / "out").iterdir():
        assert str(tmp_path) not in path.read_text()
        assert "John" not in path.read_text()
        assert "/srv" not in path.read_text()
    values = json.loads((place / "out" / "comparison.json").read_text())
    assert values["rows"][0]["runs"][0]["source"] == "../runs/own/seed0"
    assert values["rows"][0]["settings"]["dataset_name"] == "cats"
    assert list(values["budget"]["Weights at the start"]) == ["start", "random"]
    assert "line 3" in values["missing"][0]["reason"]
    assert "z:4: at q" in values["missing"][0]["reason"]


@pytest.mark.parametrize(("word", "shown"), cases(__file__, "public_words.yaml"))
def test_words_lose_absolute_paths_only(word, shown):
    assert public_word(word) == shown
