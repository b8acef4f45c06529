"""Rows that kept their predictions are set against the baseline image by image; older ones are shown and say so."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ham_hf.comparison.existing import label_runs, read_runs
from ham_hf.comparison.leaderboard import leaderboard_html
from ham_hf.comparison.pairs import mcnemar
from ham_hf.comparison.report import comparison_markdown
from ham_hf.comparison.table import compare
from ham_hf.evaluation.verdicts import write_verdicts
from ham_hf.reporting.report import write_report
from tests.support.comparison_reports import judged_run


def bold(comparison, label, attack="verdict"):
    return [
        metric
        for metric in ("average", "worst_class", "worst_30_percent")
        if comparison.is_bold(label, attack, metric)
    ]


def test_one_seed_is_enough_where_the_same_images_tell():
    """Every image that the baseline is right on is right for the other row too, and eight more."""
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71])
    comparison = compare([base, own], baseline="base")
    assert list(comparison.attacks) == ["verdict", "clean", "pgd-20"]
    paired = comparison.pairs.found["own"]["verdict"]
    assert paired.seeds == (0,)
    assert (paired.differences.only_reference, paired.differences.only_other) == ((0,), (8,))
    assert paired.differences.p_values == (mcnemar(0, 8),)
    assert paired.differences.average.mean == pytest.approx(8 / 400)
    assert paired.differences.worst_class.mean == pytest.approx(0.04)
    assert bold(comparison, "own") == bold(comparison, "own", "pgd-20") == [
        "average", "worst_class", "worst_30_percent",
    ]  # fmt: skip
    assert bold(comparison, "base") == bold(comparison, "own", "clean") == []


def test_the_same_numbers_on_other_images_say_less():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71], swap=20)
    assert bold(compare([base, own], baseline="base"), "own") == []


def test_a_worst_class_that_moved_is_no_gain():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [60, 15, 60, 70])
    comparison = compare([base, own], baseline="base")
    assert comparison.pairs.found["own"]["verdict"].differences.worst_class.is_sure()
    assert "worst_class" not in bold(comparison, "own")


def test_several_seeds_have_to_agree():
    base = [judged_run("base", [20, 50, 60, 70], seed=seed) for seed in range(3)]
    own = [judged_run("own", [40, 55, 65, 75], seed=seed) for seed in range(2)]
    agreed = compare([*base, *own, judged_run("own", [30, 55, 65, 75], seed=2)], baseline="base")
    assert bold(agreed, "own") == ["average", "worst_class", "worst_30_percent"]
    worse = judged_run("own", [19, 55, 65, 75], seed=2)
    disagreed = compare([*base, *own, worse], baseline="base")
    assert "worst_class" not in bold(disagreed, "own")
    assert "average" in bold(disagreed, "own")
    differences = disagreed.pairs.found["own"]["verdict"].differences.worst_class
    assert differences.per_seed == pytest.approx((0.2, 0.2, -0.01))
    assert differences.low > 0


def test_rows_on_other_images_are_not_paired():
    base, other = judged_run("base", [20, 50, 60, 70]), judged_run("own", [40, 50, 60, 70])
    moved = dataclasses.replace(other.verdicts, positions=other.verdicts.positions + 1)
    comparison = compare([base, dataclasses.replace(other, verdicts=moved)], baseline="base")
    assert comparison.pairs.found["own"] == {}
    assert "different images" in comparison.pairs.unpaired["own, Verdict"]


def test_a_row_judged_on_half_of_the_images_leaves_the_pairs_of_the_others():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71])
    alone = compare([base, own], baseline="base")
    half = judged_run("half", [26, 50, 50, 50], seen=50)
    comparison = compare([base, own, half], baseline="base")
    assert comparison.pairs.found["own"] == alone.pairs.found["own"]
    assert comparison.rows[1] == alone.rows[1]
    assert bold(comparison, "own") == bold(alone, "own") != []
    assert [comparison.unlike(name) for name in comparison.attacks] == [["half"], [], ["half"]]
    assert comparison.pairs.unpaired == {}
    assert {name: found.differences.num_examples for name, found in comparison.pairs.found["half"].items()} == {
        "verdict": 200, "clean": 400, "pgd-20": 200,
    }  # fmt: skip
    paired = comparison.pairs.found["half"]["verdict"].differences
    assert (paired.only_reference, paired.only_other) == ((0,), (6,))
    assert comparison.rows[2].attacks["verdict"].rho is None
    assert comparison.rows[2].attacks["clean"].rho is not None
    text = comparison_markdown(comparison, command="x")
    assert text.count("**Not the same evaluation as base:** half. Dataset,") == 2
    assert re.findall(r"^\| (own|half) \| 0 \| (\d+) \|", text, re.MULTILINE) == [("own", "400"), ("half", "200")]
    assert "Verdict, 200 images: average +3.0" in leaderboard_html(comparison)


def test_a_worst_class_is_no_gain_where_the_shared_images_say_otherwise():
    """On all images the worst class of the baseline has 20 %, on those that both saw 40 %."""
    base = judged_run("base", [20, 50, 60, 70])
    for last, better in ((25, True), (18, False)):
        comparison = compare([base, judged_run("own", [40, 50, 50, last], seen=50)], baseline="base")
        assert comparison.pairs.found["own"]["verdict"].differences.worst_class.is_sure()
        assert ("worst_class" in bold(comparison, "own")) == better


def test_seeds_judged_on_different_parts_are_paired_on_what_all_saw():
    base = [judged_run("base", [20, 40, 40, 40], seed=seed) for seed in range(2)]
    own = [judged_run("own", [30, 40, 45, 48], seed=seed, seen=seen) for seed, seen in enumerate((50, 100))]
    found = compare([*base, *own], baseline="base").pairs.found["own"]["verdict"]
    assert (found.seeds, found.differences.num_examples) == ((0, 1), 200)
    assert found.differences.only_other == (23, 23)


def test_a_row_attacked_otherwise_is_named_and_stays_apart():
    base, own = judged_run("base", [20, 50, 60, 70]), judged_run("own", [24, 52, 61, 71])
    gentle = judged_run("gentle", [60, 60, 70, 80], epsilon=4 / 255)
    comparison = compare([base, own, gentle], baseline="base")
    assert bold(comparison, "own") != []
    assert list(comparison.pairs.found["gentle"]) == ["clean"]
    assert comparison.pairs.unpaired == {
        "gentle, Verdict": "evaluated with other settings than the baseline (PGD-20)",
        "gentle, PGD-20": "evaluated with other settings than the baseline (PGD-20)",
    }
    assert [row.attacks["verdict"].rho is None for row in comparison.rows] == [False, False, True]
    assert "PGD-20: not paired: evaluated with other settings than the baseline (PGD-20)" in leaderboard_html(
        comparison
    )


def test_predictions_are_read_from_the_folders_of_runs(tmp_path):
    for run in (judged_run("base", [20, 50, 60, 70]), judged_run("own", [40, 60, 70, 80])):
        folder = tmp_path / run.label / "seed0"
        write_report(run.report, folder)
        write_verdicts(run.verdicts, folder)
    sources = [str(tmp_path / label / "seed0") for label in ("base", "own")]

    def read():
        return label_runs(read_runs(sources, download=lambda *_: pytest.fail("nothing is on the Hub")).found)

    comparison = compare(read(), baseline="base")
    assert bold(comparison, "own") == ["average", "worst_class", "worst_30_percent"]
    (tmp_path / "own" / "seed0" / "predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"own/seed0/predictions\.parquet is not a table of predictions"):
        read()
