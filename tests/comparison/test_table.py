"""The numbers of a comparison against naive ones, the same in JSON, CSV and Markdown, and nothing hidden."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings, strategies as st

from ham_hf.comparison.report import comparison_markdown
from ham_hf.comparison.table import compare
from tests.support.comparison_reports import CLEAN, METRICS, by_seeds, even, markdown_tables, run
from tests.support.documents import calibration

NAMES = ("a", "b", "c")
COUNTS = st.lists(st.integers(0, 20), min_size=3, max_size=3)


@settings(max_examples=20, deadline=None)
@given(st.lists(COUNTS, min_size=2, max_size=4), st.lists(COUNTS, min_size=1, max_size=4))
def test_numbers_are_those_of_a_naive_count(base_counts, own_counts):
    comparison = compare([*by_seeds("base", *base_counts), *by_seeds("own", *own_counts)], baseline="base")

    def naive(counts):
        average = [sum(correct) / 60 for correct in counts]
        worst = [min(correct) / 20 for correct in counts]
        return average, worst, sum(average) / len(average), sum(worst) / len(worst)

    _, _, base_average, base_worst = naive(base_counts)
    average, worst, mean_average, mean_worst = naive(own_counts)
    found = comparison.rows[1].attacks["pgd-20"]
    assert found.average.values == pytest.approx(average)
    assert found.average.mean == pytest.approx(mean_average)
    assert found.worst_class.mean == pytest.approx(mean_worst)
    assert found.worst_30_percent.mean == pytest.approx(mean_worst)  # 30 % of three classes is one class
    if len(worst) == 1:
        assert found.worst_class.std is None
    else:
        variance = sum((value - mean_worst) ** 2 for value in worst) / (len(worst) - 1)
        assert found.worst_class.std == pytest.approx(math.sqrt(variance), abs=1e-12)
    for index in range(3):
        assert found.per_class[index] == pytest.approx(sum(c[index] for c in own_counts) / 20 / len(own_counts))
    if base_worst == 0:
        assert found.rho is None
    else:
        expected = (mean_worst - base_worst) / base_worst + (mean_average - base_average) / base_average
        assert found.rho == pytest.approx(expected)
    if any(not any(correct) for correct in own_counts):
        assert found.nsd is None
    else:
        nsd = []
        for correct in own_counts:
            mean = sum(correct) / 3
            nsd.append(math.sqrt(sum((c - mean) ** 2 for c in correct) / 3) / mean)
        assert found.nsd.mean == pytest.approx(sum(nsd) / len(nsd))


def test_rho_of_a_published_table():
    """DAFA against TRADES, CIFAR-10, PGD: worst 21.31 -> 30.53, average 49.80 -> 49.05 gives 0.42."""
    counts = [10_000] * 2
    base = run("base", {"pgd-20": ([2131, 7829], counts)}, class_names=NAMES[:2])
    own = run("own", {"pgd-20": ([3053, 6757], counts)}, class_names=NAMES[:2])
    comparison = compare([base, own], baseline="base")
    assert comparison.rows[1].attacks["pgd-20"].rho == pytest.approx(0.42, abs=0.005)
    assert comparison.rows[0].attacks["pgd-20"].rho == 0
    assert all(row.attacks["pgd-20"].rho is None for row in compare([base, own]).rows)


@pytest.mark.parametrize(
    ("metric", "other", "own", "best"),
    [
        ("average", [10, 12], [16, 18], "own"),  # 30 points apart, noise 10
        ("average", [10, 16], [12, 18], None),  # 10 points apart, noise 30
        ("average", [10, 12], [18], None),  # one seed
        ("average", [10, 10], [10, 10], None),  # a tie
        # All seeds agree, but of 20 images a class, 10 and 14 right are 20 points apart, and sqrt(p q / 20) of both
        # together 15: a few images are noise.
        ("worst_class", [10, 10], [11, 11], None),
        ("worst_class", [10, 10], [12, 12], None),
        ("worst_class", [10, 10], [14, 14], "own"),
    ],
)
def test_best_is_what_beats_the_next_by_more_than_the_noise(metric, other, own, best):
    """Of three classes with so many right in each seed."""
    rows = (by_seeds(label, *([right] * 3 for right in counts)) for label, counts in (("other", other), ("own", own)))
    comparison = compare([run for row in rows for run in row])
    assert comparison.best("pgd-20", metric) == best
    assert comparison.best("pgd-20", "nsd") is None
    assert comparison.best("clean", "average") is None
    text = comparison_markdown(comparison, command="x")
    bold = any(comparison.best("pgd-20", name) for name in METRICS)
    assert ("**" in re.sub(r"\*\*Not the same.*?\*\*", "", text)) == bold


def test_noise_is_that_of_the_next_best_and_lower_nsd_is_better():
    uneven, even_runs = [[2, 20, 20], [3, 20, 20]], [[14, 14, 14], [14, 14, 15]]
    wild = by_seeds("wild", [0, 0, 1], [9, 10, 20])
    comparison = compare([*by_seeds("uneven", *uneven), *by_seeds("even", *even_runs), *wild])
    assert comparison.best("pgd-20", "nsd") == "even"
    assert comparison.best("pgd-20", "worst_class") == "even"
    table = markdown_tables(comparison_markdown(comparison, command="x"))["PGD-20"]
    (row,) = (row for row in table if row[0] == "even")
    assert [cell.startswith("**") for cell in row] == [False, False, False, True, True, True]


def test_missing_class_is_none_and_enters_no_mean():
    results = {"pgd-20": ([10, 0, 5], [20, 0, 20])}
    first = run("own", results, class_names=NAMES)
    (both,) = compare([first, run("own", {"pgd-20": even([20, 8, 5])}, seed=1, class_names=NAMES)]).rows
    assert both.attacks["pgd-20"].per_class == (0.75, 0.4, 0.25)
    (row,) = compare([first]).rows
    assert row.attacks["pgd-20"].per_class == (0.5, None, 0.25)
    assert row.attacks["pgd-20"].worst_class.mean == 0.25


def test_strongest_shared_attack_prefers_the_whole_test_set():
    def results(pgd_correct, few):
        auto = ([2] * 10, [10] * 10) if few else even([2] * 10)
        return {"clean": CLEAN, "pgd-20": even([pgd_correct] * 10), "cw-20": even([9] * 10), "autoattack": auto}

    for few, strongest in ((False, "autoattack"), (True, "cw-20")):
        runs = [run("a", results(11, few)), run("b", results(8, few))]
        assert compare(runs).strongest_shared_attack() == strongest


def test_price_is_relative_to_the_passes_of_the_baseline():
    rows = {"base": [1000.0, 3000.0], "half": [900.0, 1100.0], "older": [None, 500.0]}
    runs = [
        run(label, {"clean": even([10] * 10)}, seed=seed, passes=passes)
        for label, counts in rows.items()
        for seed, passes in enumerate(counts)
    ]
    comparison = compare(runs, baseline="base")
    assert [row.price for row in comparison.rows] == [1.0, 0.5, None]
    assert [row.price for row in compare(runs).rows] == [None, None, None]


def test_seconds_include_the_calibration_as_passes_do():
    """Also of reports of earlier versions, as it has always been among their entries."""
    base, fair = (run(label, {"clean": even([10] * 10)}, seconds=90.0) for label in ("base", "fair"))
    report = dataclasses.replace(fair.report, calibration=calibration(seconds=7.5))
    rows = compare([base, dataclasses.replace(fair, report=report)], baseline="base").rows
    assert [row.seconds.mean for row in rows] == [90.0, 97.5]


def test_what_cannot_be_compared_is_refused():
    runs = by_seeds("own", [10, 12, 4])
    with pytest.raises(ValueError, match="no finished run"):
        compare([])
    with pytest.raises(ValueError, match=r"same run \(own, seed 0\)"):
        compare([*runs, dataclasses.replace(runs[0], source="elsewhere")])
    with pytest.raises(ValueError, match="--baseline base: expected one of own"):
        compare(runs, baseline="base")


def test_equal_means_are_a_tie_whatever_the_last_bit_says():
    exact = compare([*by_seeds("one", [20] * 3, [20] * 3), *by_seeds("other", [20] * 3, [20] * 3)])
    nsd = [row.attacks["pgd-20"].nsd for row in exact.rows]
    shifted = dataclasses.replace(nsd[1], mean=nsd[1].mean + 1e-16)
    attacks = {**exact.rows[1].attacks}
    attacks["pgd-20"] = dataclasses.replace(attacks["pgd-20"], nsd=shifted)
    rows = (exact.rows[0], dataclasses.replace(exact.rows[1], attacks=attacks))
    assert dataclasses.replace(exact, rows=rows).best("pgd-20", "nsd") is None


def test_image_noise_is_that_of_a_naive_count_and_not_less_with_more_seeds():
    counts = ([3, 6, 5, 9], [10, 20, 10, 12])  # 30 % of four classes are two: 3 of 10 and 6 of 20
    runs = [run("own", {"pgd-20": counts}, seed=seed, class_names="abcd") for seed in range(3)]
    found = compare(runs).rows[0].attacks["pgd-20"].image_variances
    average = 23 / 52
    assert found["average"] == pytest.approx(average * (1 - average) / 52)
    assert found["worst_class"] in (pytest.approx(0.3 * 0.7 / 10), pytest.approx(0.3 * 0.7 / 20))
    assert found["worst_30_percent"] == pytest.approx((0.21 / 10 + 0.21 / 20) / 4)
    assert "nsd" not in found
