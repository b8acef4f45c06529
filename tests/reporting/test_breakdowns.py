"""Groups and corruptions in report.json, EVALUATION.md, report.html and predictions.parquet."""

from __future__ import annotations

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import ham_hf
from ham_hf.attacks import ThreatModel
from ham_hf.data.image_groups import make_groups
from ham_hf.evaluation.verdicts import read_verdicts, verdicts_of, write_verdicts
from ham_hf.metrics import wilson_interval
from ham_hf.reporting.breakdowns import corruption_report, group_report
from ham_hf.reporting.page import PageRun, page_html
from ham_hf.reporting.tables import breakdown_tables, each_group_rows, group_rows
from tests.support.documents import GROUP_VALUES, GROUPS, corrupted, grouped_results, with_breakdowns
from tests.support.example_report import attack_result
from tests.support.nets import group_norm_net

HOSTILE = "<b>*x*|</b>"
CLASSES = tuple(map(str, range(10)))


def made_up():
    """Three evaluations of images in groups, one of them by a foreign attack on every second image."""
    results = grouped_results(torch.Generator().manual_seed(0), ("clean", "pgd-20", "my.attack"))
    whole = results["my.attack"]
    part = attack_result(whole.name, {"function": "m.py:attack"}, whole.predictions[::2], whole.labels[::2])
    results["my.attack"] = dataclasses.replace(part, indices=torch.arange(0, 80, 2))
    return results, verdicts_of(results, CLASSES, GROUPS)


def test_groups_against_a_loop_over_the_images():
    results, verdicts = made_up()
    found = group_report(verdicts)
    assert found.names == (HOSTILE, "a", "b", "(missing)")
    assert found.num_missing == GROUP_VALUES.count(None)
    assert list(found.results) == ["verdict", "clean", "pgd-20", "my.attack"]
    right = {}
    for number in range(80):
        clean = results["clean"].predictions[number] == results["clean"].labels[number]
        pgd = clean and results["pgd-20"].predictions[number] == results["pgd-20"].labels[number]
        right[number] = {"clean": bool(clean), "pgd-20": bool(pgd)}
        if number % 2 == 0:
            mine = clean and results["my.attack"].predictions[number // 2] == results["my.attack"].labels[number // 2]
            right[number] |= {"my.attack": bool(mine), "verdict": bool(pgd and mine)}
    for name, result in found.results.items():
        for group, entry in enumerate(result.summary.per_class):
            value = None if found.names[group] == "(missing)" else found.names[group]
            rows = [number for number in right if GROUP_VALUES[number] == value and name in right[number]]
            hits = sum(right[number][name] for number in rows)
            assert (entry.count, entry.correct) == (len(rows), hits)
            assert (entry.low, entry.high) == wilson_interval(hits, len(rows))
        shares = sorted(entry.accuracy for entry in result.summary.per_class)
        assert result.summary.worst_class == shares[0]
        assert result.summary.worst_30_percent == pytest.approx(sum(shares[:2]) / 2)
        low, high = result.intervals.worst_class
        assert low <= shares[0] <= high


def test_worst_30_percent_is_left_out_of_few_groups():
    results, _ = made_up()
    few = group_report(verdicts_of(results, CLASSES, make_groups("half", [True, False] * 40)))
    assert "Worst 30 % of groups" not in group_rows(few)[0]
    assert "Worst 30 % of groups" in group_rows(group_report(made_up()[1]))[0]
    assert [next(iter(row)) for row in each_group_rows(few)] == ["half", "half"]
    rows = each_group_rows(dataclasses.replace(few, column="Images"))
    assert [row["Images (group)"] for row in rows] == [row["half"] for row in each_group_rows(few)]


def test_number_of_images_beside_an_accuracy_of_a_group_is_its_own():
    found = group_report(made_up()[1])
    part = dict(zip(found.names, found.results["my.attack"].summary.per_class, strict=True))
    clean = dict(zip(found.names, found.results["clean"].summary.per_class, strict=True))
    for row in each_group_rows(found):
        assert row["Images"] == str(clean[row["site"]].count)
        assert row["my.attack"].endswith(f") of {part[row['site']].count}")
        assert row["PGD-20"].endswith(")")


def test_corruption_numbers_are_means_of_counts():
    labels = torch.arange(80) % 8  # classes 8 and 9 have no image
    results = corrupted(torch.Generator().manual_seed(1))
    found = corruption_report(results, labels, 10, constants="CIFAR-10-C")
    assert (found.names, found.severities) == (("fog", "snow"), (1, 5))
    assert found.counts == (10,) * 8 + (0, 0)
    for entry, result in zip(found.results, results, strict=True):
        per_class = [int(result.flags[labels == label].sum()) for label in range(10)]
        assert entry.correct == tuple(per_class)
        assert entry.average == pytest.approx(sum(per_class) / 80)
        assert entry.worst_class == min(per_class[:8]) / 10
        assert entry.worst_30_percent == pytest.approx(sum(sorted(per_class[:8])[:3]) / 30)
    assert found.mean == pytest.approx(sum(float(result.flags.double().mean()) for result in results) / 4)
    means = [sum(entry.correct[label] for entry in found.results) / 40 for label in range(8)]
    assert found.class_means == (*map(pytest.approx, means), None, None)
    assert found.worst_class == pytest.approx(min(means))
    assert found.worst_class_index == means.index(min(means))
    assert found.worst_30_percent == pytest.approx(sum(sorted(means)[:3]) / 3)
    assert corruption_report([], labels, 10, constants="") is None


def test_page_and_terminal_show_both():
    report = with_breakdowns()
    page = page_html([PageRun(label="run", report=report)])
    assert "Each group by site" in page
    assert "<td>–</td>" in page
    assert HOSTILE not in page
    assert [len(rows) for _, rows in breakdown_tables(report)] == [3, 4, 4]


def test_predictions_hold_the_groups_and_files_without_them_still_read(tmp_path):
    results, verdicts = made_up()
    path = write_verdicts(verdicts, tmp_path)
    table = pq.read_table(path)
    assert table.column("group").to_pylist() == GROUP_VALUES
    assert json.loads(table.schema.metadata[b"ham_hf.predictions"])["schema_version"] == 1
    assert "prediction_my.attack" in table.column_names
    found, groups = read_verdicts(path).groups, verdicts.groups
    assert (found.column, found.names, found.num_missing) == ("site", groups.names, groups.num_missing)
    assert torch.equal(found.of_image, groups.of_image)
    write_verdicts(verdicts_of(results, verdicts.class_names), tmp_path)
    assert read_verdicts(path).groups is None
    assert "group" not in pq.read_table(path).column_names
    broken = table.set_column(table.column_names.index("group"), "group", [["nowhere"] * 80])
    pq.write_table(broken.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(ValueError, match="not a table of predictions"):
        read_verdicts(path)


def test_python_interface_reads_groups_from_the_batches():
    net = group_norm_net().float()
    x = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    sites = ["north", "south", "east"] * 4
    rows = [{"pixel_values": x[number], "labels": number % 4, "site": sites[number]} for number in range(12)]
    options = {"threat_model": ThreatModel("linf", 0.02), "num_steps": 1}
    found = ham_hf.evaluate(net, DataLoader(rows, batch_size=5), group_column="site", **options)
    assert found.groups.names == ("east", "north", "south")
    assert [entry.count for entry in found.groups.results["clean"].summary.per_class] == [4, 4, 4]
    right = [int(found.verdicts.withstood[group::3].sum()) for group in (2, 0, 1)]
    assert [entry.correct for entry in found.groups.results["verdict"].summary.per_class] == right
    assert "site" in str(found)
    with pytest.raises(ValueError, match="group_column size: a batch has no such key; its keys are 'pixel_values'"):
        ham_hf.evaluate(net, DataLoader(rows, batch_size=5), group_column="size", **options)
    with pytest.raises(ValueError, match="it is not a mapping: tuple"):
        ham_hf.evaluate(net, [(x, torch.arange(12) % 4)], group_column="site", **options)
