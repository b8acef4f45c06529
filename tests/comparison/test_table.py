"""The numbers of a comparison against naive ones, the same in JSON, CSV and Markdown, and nothing hidden."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ham_hf.comparison.differences import run_settings
from ham_hf.comparison.existing import label_runs
from ham_hf.comparison.pairs import FinishedRun
from ham_hf.comparison.report import comparison_csv, comparison_json, comparison_markdown, write_comparison
from ham_hf.comparison.table import MissingRun, compare
from ham_hf.reporting.formats import public_word
from tests.support.comparison_reports import by_seeds, even, run, run_report
from tests.support.documents import calibration, changed

CLEAN = even([18, 17, 20, 16, 19, 20, 15, 18, 17, 20])
NAMES = ("a", "b", "c")
COUNTS = st.lists(st.integers(0, 20), min_size=3, max_size=3)


def found(source: str, label: str = "", *, seed: int = 0, **config: object) -> FinishedRun:
    """A run as it was found, before rows are made."""
    return FinishedRun(label=label, seed=seed, report=run_report({"clean": CLEAN}, seed=seed, **config), source=source)


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """The first table under each heading, as a Markdown reader sees it: rows of cells, "**" kept."""
    tables, heading, rows = {}, "", []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline" and before.type == "heading_open":
            heading = token.content
        elif token.type == "tr_open":
            rows = tables.setdefault(heading, [])
            rows.append([])
        elif token.type == "inline" and before.type in ("td_open", "th_open"):
            rows[-1].append(token.content)
    return tables


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
    bold = any(comparison.best("pgd-20", name) for name in ("average", "worst_class", "worst_30_percent"))
    assert ("**" in re.sub(r"\*\*Not the same.*?\*\*", "", text)) == bold


def test_noise_is_that_of_the_next_best_and_lower_nsd_is_better():
    uneven, even_runs = [[2, 20, 20], [3, 20, 20]], [[14, 14, 14], [14, 14, 15]]
    comparison = compare(
        [*by_seeds("uneven", *uneven), *by_seeds("even", *even_runs), *by_seeds("wild", [0, 0, 1], [9, 10, 20])]
    )
    assert comparison.best("pgd-20", "nsd") == "even"
    assert comparison.best("pgd-20", "worst_class") == "even"
    row = next(
        row for row in markdown_tables(comparison_markdown(comparison, command="x"))["PGD-20"] if row[0] == "even"
    )
    assert [cell.startswith("**") for cell in row] == [False, False, False, True, True, True]


def test_json_and_csv_agree():
    runs = [*by_seeds("base", [10, 12, 4], [11, 13, 6]), *by_seeds("own", [12, 12, 8], [12, 13, 9], seconds=30.0)]
    comparison = compare(runs, baseline="base")
    values = json.loads(comparison_json(comparison, command="x"))
    lines = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert [line["label"] + line["evaluation"] for line in lines] == [
        "baseclean",
        "basepgd-20",
        "ownclean",
        "ownpgd-20",
    ]
    for line in lines:
        row = next(row for row in values["rows"] if row["label"] == line["label"])
        numbers = row["attacks"][line["evaluation"]]
        for metric in ("average", "worst_class", "worst_30_percent", "nsd"):
            assert float(line[f"{metric}_mean"]) == numbers[metric]["mean"]
            assert float(line[f"{metric}_std"]) == numbers[metric]["std"]
        assert float(line["rho"]) == numbers["rho"]
        assert float(line["training_seconds_mean"]) == row["training_seconds"]["mean"]
        assert float(line["peak_memory_bytes_mean"]) == row["peak_memory_bytes"]["mean"] == 6e8


def test_missing_class_is_none_and_enters_no_mean():
    results = {"pgd-20": ([10, 0, 5], [20, 0, 20])}
    both = compare(
        [run("own", results, class_names=NAMES), run("own", {"pgd-20": even([20, 8, 5])}, seed=1, class_names=NAMES)]
    )
    assert both.rows[0].attacks["pgd-20"].per_class == (0.75, 0.4, 0.25)
    (row,) = compare([run("own", results, class_names=NAMES)]).rows
    assert row.attacks["pgd-20"].per_class == (0.5, None, 0.25)
    assert row.attacks["pgd-20"].worst_class.mean == 0.25


def test_attack_that_a_run_lacks_has_fewer_seeds():
    with_attack = run("own", {"clean": CLEAN, "autoattack": even([5] * 10)}, seed=0)
    comparison = compare([with_attack, run("own", {"clean": CLEAN}, seed=1), run("other", {"clean": CLEAN})])
    tables = markdown_tables(comparison_markdown(comparison, command="x"))
    assert tables["AutoAttack"][1][:3] == ["own", "1", "25.0"]
    assert tables["AutoAttack"][2] == ["other", "0", *["–"] * 4]
    assert tables["Clean"][1][1] == "2"
    assert comparison.strongest_shared_attack() is None


def test_strongest_shared_attack_prefers_the_whole_test_set():
    def results(pgd_correct, few):
        auto = ([2] * 10, [10] * 10) if few else even([2] * 10)
        return {"clean": CLEAN, "pgd-20": even([pgd_correct] * 10), "cw-20": even([9] * 10), "autoattack": auto}

    assert (
        compare([run("a", results(10, False)), run("b", results(8, False))]).strongest_shared_attack() == "autoattack"
    )
    subset = compare([run("a", results(11, True)), run("b", results(8, True))])
    assert subset.strongest_shared_attack() == "cw-20"


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


def test_existing_runs_are_grouped_by_their_settings():
    runs = label_runs(
        [
            found("a", seed=0, method="ham", output_dir="x", resume_from_checkpoint=None),
            found("b", seed=1, method="ham", output_dir="y", resume_from_checkpoint="latest"),
            found("c", seed=0, method="ham", output_dir="z", resume_from_checkpoint=None, epsilon=0.2),
            found("d", seed=0, method="pgd_at", output_dir="w"),
            found("e/seed0", "mine", seed=0, method="pgd_at", output_dir="w"),
        ]
    )
    assert [(run.source, run.label, run.seed) for run in runs] == [
        ("a", "ham (epsilon 8/255)", 0),
        ("b", "ham (epsilon 8/255)", 1),
        ("c", "ham (epsilon 0.2)", 0),
        ("d", "pgd_at", 0),
        ("e/seed0", "mine", 0),
    ]
    shown = compare(runs).rows[1].settings
    assert (shown["epsilon"], shown["method"]) == (0.2, "ham")
    assert not {"seed", "output_dir", "learning_rate"} & set(shown)


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


@pytest.mark.parametrize(
    "parts",
    [
        {"dataset": {"name": "other", "hub_id": "me/other"}},
        {"dataset": {"test_split_origin": "test"}},
        {"threat_model": {"epsilon": 0.1}},
    ],
    ids=["dataset", "images", "epsilon"],
)
def test_different_evaluations_have_no_rho_and_no_bold(parts):
    base, own = by_seeds("base", [5] * 3, [5] * 3), by_seeds("own", [19] * 3, [19] * 3)
    assert compare([*base, *own], baseline="base").best("pgd-20", "average") == "own"
    comparison = compare([*base, *(changed(one, **parts) for one in own)], baseline="base")
    assert comparison.best("pgd-20", "average") is None
    assert [row.attacks["pgd-20"].rho for row in comparison.rows] == [0, None]
    assert all(comparison.unlike(name) == ["own"] for name in comparison.attacks)


def test_only_the_attack_with_other_settings_is_not_compared():
    base, own = by_seeds("base", [5] * 3, [5] * 3), by_seeds("own", [19] * 3, [19] * 3)
    attack = dataclasses.replace(own[0].report.results["pgd-20"], settings={"num_steps": 3, "seed": 7})
    results = {**own[0].report.results, "pgd-20": attack}
    own[0] = dataclasses.replace(own[0], report=dataclasses.replace(own[0].report, results=results))
    comparison = compare([*base, *own], baseline="base")
    assert {name: comparison.unlike(name) for name in comparison.attacks} == {"clean": [], "pgd-20": ["own"]}
    assert comparison.rows[1].attacks["clean"].rho == 0


def test_batch_size_and_accumulation_count_by_their_product():
    ours = {"method": "ham", "per_device_train_batch_size": 64, "ddp_timeout": 1800}
    assert run_settings(ours) == run_settings(
        {"method": "ham", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "ddp_timeout": 60}
    )
    assert run_settings(ours) != run_settings(ours | {"gradient_accumulation_steps": 2})
    assert run_settings(ours) != run_settings(ours | {"per_device_train_batch_size": 32})


def test_averaged_weights_are_another_budget():
    """CFA averages by itself: no setting differs, and yet its row is of other weights."""
    rows = [
        *by_seeds("one", [5] * 3, fawa="auto"),
        *by_seeds("cfa", [5] * 3, method="cfa", fawa="auto", fawa_decay=0.85),
        *by_seeds("ema", [5] * 3, fawa="auto", ema_decay=0.99),
    ]
    assert compare(rows).unequal["Weight averaging"] == {
        "none": ("one",),
        "fairness-gated per epoch, decay 0.85": ("cfa",),
        "per update, decay 0.99": ("ema",),
    }
    history = [{**record, "averaged": False} for record in rows[1].report.training.history]
    never = changed(rows[1], training={"history": history})
    assert compare([rows[0], never]).unequal["Weight averaging"] == {
        "none": ("one",),
        "none (no epoch passed the gate)": ("cfa",),
    }


def test_setting_younger_than_a_report_has_its_default():
    old = found("old", method="ham")
    new = found("new", seed=1, method="ham", awp_gamma=None, base_loss="pgd_at")
    assert [(one.label, one.seed) for one in label_runs([old, new])] == [("ham", 0), ("ham", 1)]
    runs = label_runs([old, found("perturbed", method="ham", awp_gamma=0.01)])
    assert [one.label for one in runs] == ["ham (awp_gamma null)", "ham (awp_gamma 0.01)"]


def test_setting_that_one_of_two_lacks_has_a_label():
    runs = label_runs([found("s0", "mine"), found("s1", "mine", younger=1)])
    assert [one.label for one in runs] == ["mine (younger (none))", "mine (younger 1)"]


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
    reason = (
        f"status 1:\n  File \"{place}/train.py\", line 3\n  no such file: '{place}/x y'; {tmp_path}/z:4: at /srv/me/q"
    )
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


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--output_dir=/srv/me/out dir/", "--output_dir=out dir"),
        ("~/runs/a", "a"),
        ("--launch_args=--config_file /etc/x.yaml -m", "--launch_args=--config_file x.yaml -m"),
        ("local-dir:/srv/model", "local-dir:model"),
        ("file:///srv/model", "model"),
        ("C:\\Users\\me\\a", "a"),
        ("8/255", "8/255"),
        ("me/robust@v1", "me/robust@v1"),
        ("https://host/path", "https://host/path"),
        ("outputs/a", "outputs/a"),
        ("/", ""),
    ],
)
def test_words_lose_absolute_paths_only(word, shown):
    assert public_word(word) == shown
