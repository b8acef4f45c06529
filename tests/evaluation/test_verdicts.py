"""Verdicts on disk: what is written reads back equal; what is damaged, foreign or of another version is refused."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ham_hf.artifacts import PREDICTIONS_NAME
from ham_hf.evaluation.verdicts import match_verdicts, read_verdicts, verdicts_of, write_verdicts
from ham_hf.reporting.run_report import verdict_report
from tests.support.example_report import attack_result

NAMES = ("cat", "dog", 'Vögel, \n"x"')
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
INF, NAN = float("inf"), float("nan")


def result(name, predictions, margins, indices=None, **settings):
    indices = torch.arange(len(LABELS)) if indices is None else torch.tensor(indices)
    found = attack_result(name, settings, torch.tensor(predictions), LABELS[indices])
    return dataclasses.replace(found, margins=torch.tensor(margins), indices=indices)


def results(**changes):
    """Image 0 withstands all, 1 falls to one attack alone, 2 is wrong as it is, 3 to 5 are not seen by autoattack."""
    found = {
        "clean": result("clean", [0, 0, 2, 1, 2, -1], [3.0, 2.0, -1.0, 1.0, INF, NAN]),
        "pgd-2": result("pgd-2", [0, 0, 2, 1, 0, -1], [1.0, 1.5, -1.0, 0.25, -2.0, NAN], num_steps=2, seed=7),
        "autoattack": result("autoattack", [1, 2, 0], [-0.5, -1.0, 2.0], [1, 2, 0], seed=7, version="standard"),
    }
    return found | changes


def test_verdicts_against_a_loop_over_the_images(tmp_path):
    verdicts = verdicts_of(results(), NAMES)
    path = write_verdicts(verdicts, tmp_path / "made")
    assert path == tmp_path / "made" / PREDICTIONS_NAME
    assert [entry.name for entry in path.parent.iterdir()] == [PREDICTIONS_NAME]
    rows = pq.read_table(path).to_pylist()
    assert list(rows[0]) == [
        "position", "label", "prediction_clean", "prediction_pgd-2", "prediction_autoattack", "margin_clean",
        "margin_attacked", "verdict",
    ]  # fmt: skip
    assert [row["position"] for row in rows] == list(range(6))
    assert [row["label"] for row in rows] == LABELS.tolist()
    for row, label in zip(rows, LABELS.tolist(), strict=True):
        seen = [row["prediction_pgd-2"], row["prediction_autoattack"]]
        expected = row["prediction_clean"] == label and all(one == label for one in seen)
        assert row["verdict"] == (None if None in seen else expected)
    assert [row["verdict"] for row in rows] == [True, False, False, None, None, None]
    assert [row["prediction_autoattack"] for row in rows] == [0, 1, 2, None, None, None]
    assert [row["prediction_clean"] for row in rows] == [0, 0, 2, 1, 2, -1]
    assert [row["margin_clean"] for row in rows] == [3.0, 2.0, -1.0, 1.0, INF, None]
    assert [row["margin_attacked"] for row in rows] == [1.0, -0.5, -1.0, 0.25, -2.0, None]


def test_what_is_written_reads_back(tmp_path):
    verdicts = verdicts_of(results(), NAMES)
    write_verdicts(verdicts, tmp_path)
    for path in (tmp_path, tmp_path / PREDICTIONS_NAME):
        again = read_verdicts(path)
        assert again.class_names == NAMES
        settings = {"pgd-2": {"num_steps": 2, "seed": 7}, "autoattack": {"seed": 7, "version": "standard"}}
        assert again.attacks == settings
        for name in ("positions", "labels", "clean", "judged", "withstood"):
            assert torch.equal(getattr(again, name), getattr(verdicts, name)), name
        for name in verdicts.attacked:
            assert torch.equal(again.attacked[name], verdicts.attacked[name])
        for name in ("margins_clean", "margins_attacked"):
            torch.testing.assert_close(getattr(again, name), getattr(verdicts, name), equal_nan=True, rtol=0, atol=0)


def test_writing_twice_gives_the_same_bytes_and_replaces(tmp_path):
    first = write_verdicts(verdicts_of(results(), NAMES), tmp_path).read_bytes()
    other = results(autoattack=result("autoattack", [0], [1.0], indices=[0]))
    assert write_verdicts(verdicts_of(other, NAMES), tmp_path).read_bytes() != first
    assert write_verdicts(verdicts_of(results(), NAMES), tmp_path).read_bytes() == first


def test_the_headline_is_of_the_images_that_every_attack_saw():
    verdicts = verdicts_of(results(), NAMES)
    report = verdict_report(verdicts, seconds=4.5)
    assert report.title == "Verdict"
    assert report.settings == {"attacks": ["pgd-2", "autoattack"]}
    assert report.summary.num_examples == 3
    assert [entry.count for entry in report.summary.per_class] == [2, 1, 0]
    assert [entry.correct for entry in report.summary.per_class] == [1, 0, 0]
    assert report.intervals.worst_class[0] == 0.0
    without = verdicts_of({"clean": results()["clean"]}, NAMES)
    assert not without.judged.any()
    assert verdict_report(without, seconds=1.0) is None


def rewrite(path, change_table=lambda table: table, change_about=lambda about: about):
    table = change_table(pq.read_table(path))
    about = json.loads(table.schema.metadata[b"ham_hf.predictions"])
    pq.write_table(table.replace_schema_metadata({"ham_hf.predictions": json.dumps(change_about(about))}), path)


def replaced(name, values):
    def change(table):
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change_about": lambda about: about | {"schema_version": 2}}, "schema_version 2, expected 1"),
        ({"change_about": lambda about: about | {"class_names": ["a"]}}, "outside of the 1 classes"),
        ({"change_about": lambda about: about | {"class_names": "abc"}}, "does not list the class names"),
        ({"change_about": lambda about: about | {"attacks": {"cw-9": {}}}}, "not a table of predictions"),
        ({"change_about": lambda about: about | {"attacks": ["pgd-2"]}}, "not a table of predictions"),
        ({"change_about": lambda about: [about]}, "not a table of predictions"),
        ({"change_table": lambda table: table.drop_columns(["label"])}, "not a table of predictions"),
        ({"change_table": lambda table: table.slice(0, 0)}, "no row"),
        ({"change_table": replaced("label", [0, 0, 1, 1, 2, None])}, "label has empty cells"),
        ({"change_table": replaced("label", ["a"] * 6)}, "not a table of predictions"),
        ({"change_table": replaced("position", [0, 1, 2, 3, 4, 4])}, "a position occurs twice"),
        ({"change_table": replaced("prediction_pgd-2", [0, 0, 2, 1, 0, 3])}, "prediction_pgd-2 has values outside"),
        ({"change_table": replaced("verdict", [True, True, False, None, None, None])}, "contradicts the predictions"),
    ],
)
def test_files_that_are_not_ours_are_refused_by_name(tmp_path, changes, message):
    path = write_verdicts(verdicts_of(results(), NAMES), tmp_path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=rf"(?s)predictions\.parquet .*{message}"):
        read_verdicts(path)


def test_files_that_are_no_parquet_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"predictions\.parquet"):
        read_verdicts(tmp_path)
    path = write_verdicts(verdicts_of(results(), NAMES), tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-20] + b"\0" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"predictions\.parquet is not a table of predictions"):
            read_verdicts(path)
    pq.write_table(pa.table({"label": [1]}), path)
    with pytest.raises(ValueError, match=r"predictions\.parquet is not a table of predictions"):
        read_verdicts(path)


def test_two_models_are_matched_image_by_image():
    ours = verdicts_of(results(), NAMES)
    other_seed = result("pgd-2", [0, 1, 2, 1, 2, 2], [1.0] * 6, num_steps=2, seed=8)
    theirs = verdicts_of(results(**{"pgd-2": other_seed}), NAMES)
    matched = match_verdicts(ours, theirs)
    assert matched.positions.tolist() == [0, 1, 2]
    assert matched.labels.tolist() == [0, 0, 1]
    assert matched.reference.tolist() == [True, False, False]
    assert matched.other.tolist() == [True, False, False]
    matched = match_verdicts(ours, theirs, "pgd-2")
    assert matched.positions.tolist() == list(range(6))
    assert matched.reference.tolist() == [True, True, False, True, False, False]
    # The last image is right under the attack and wrong as it is: an attack never makes an image right.
    assert matched.other.tolist() == [True, False, False, True, True, False]
    assert match_verdicts(ours, theirs, "clean").other.tolist() == [True, True, False, True, True, False]
    attack = result("autoattack", [0, 0], [1.0, 1.0], indices=[1, 3], version="standard")
    assert match_verdicts(ours, verdicts_of(results(autoattack=attack), NAMES)).positions.tolist() == [1]


ELSEWHERE = result("autoattack", [0, 0], [1.0, 1.0], indices=[3, 4], version="standard")


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({}, ("cat", "dog", "bird"), "different classes"),
        ({"pgd-2": result("pgd-2", [0] * 6, [1.0] * 6, num_steps=3)}, NAMES, "different attacks"),
        ({"autoattack": ELSEWHERE}, NAMES, "no judged image in common"),
    ],
)
def test_models_that_saw_something_else_are_not_paired(changes, names, message):
    with pytest.raises(ValueError, match=message):
        match_verdicts(verdicts_of(results(), NAMES), verdicts_of(results(**changes), names))
