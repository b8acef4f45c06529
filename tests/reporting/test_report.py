"""report.json reads back to the equal report and refuses what it is not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from ham_hf.data import in_memory
from ham_hf.reporting.formats import plain_text, text_table
from ham_hf.reporting.report import AttackReport, read_report, write_report
from ham_hf.reporting.run_report import attack_report, environment, hub_dataset_id, source_commit
from ham_hf.reporting.tables import class_rows, results_table
from tests.support.documents import calibrated, with_breakdowns
from tests.support.example_report import DIGITS, attack_result, make_report

HOSTILE_NAMES = ("", "a\nb", "[1,  2]", '["\\n', "\ud7ff\u202e", "x" * 10_000, "NaN", "猫", "a [\n b ]", *DIGITS[:3])


WITH_AUTOATTACK = {"attacks": ("clean", "pgd-20", "autoattack"), "num_autoattack": 100}
REPORTS = {
    "trained": make_report(),
    "evaluated": make_report(trained=False, attacks=("clean",)),
    "a class less": make_report(missing=(2, 5), **WITH_AUTOATTACK),
    "hostile names": make_report(class_names=HOSTILE_NAMES),
    "verdict": make_report(missing=(2,), verdict=True, **WITH_AUTOATTACK),
    "many classes": make_report(class_names=[str(index) for index in range(201)], num_test=1000),
    "calibrated": calibrated(),
    "broken down": with_breakdowns(),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_report_reads_back_equal(tmp_path: Path, report) -> None:
    path = write_report(report, tmp_path / "run")
    assert read_report(path) == report
    assert read_report(tmp_path / "run") == report
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


def test_reports_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have no verdict, intervals, groups and corruptions."""
    path = write_report(make_report(), tmp_path)
    values = json.loads(path.read_text())
    del values["verdict"], values["groups"], values["corruptions"]
    for attack in values["results"].values():
        del attack["intervals"]
    path.write_text(json.dumps(values))
    report = read_report(path)
    assert report.verdict is report.groups is report.corruptions is report.results["clean"].intervals is None
    assert [row["Evaluation"] for row in results_table(report, intervals=True)] == ["Clean", "PGD-20", "CW-20"]


def test_a_row_of_the_confusion_matrix_is_one_line(tmp_path: Path) -> None:
    report = make_report()
    lines = write_report(report, tmp_path).read_text().splitlines()
    row = ", ".join(map(str, report.results["clean"].confusion[0]))
    assert any(line.strip() == f"[ {row} ]," for line in lines)
    assert len(lines) < 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda v, n=n: v.update(schema_version=n), r"schema_version .* expected 1") for n in (0, 2, None, "1")),
        (lambda values: values.pop("model"), "should have the keys"),
        (lambda values: values.update(surprise=1), "should have the keys"),
        (lambda values: values["seeds"].update(seed="0"), r"report\.seeds\.seed should be int"),
        (lambda values: values["model"].update(image_size=None), r"report\.model\.image_size should be int"),
        (lambda values: values["results"]["clean"]["summary"].update(average=True), "average should be float"),
        (lambda values: values.update(results={}), "at least one evaluation"),
        (lambda values: values["results"]["clean"]["intervals"].update(gap=[0.1]), "an interval has two ends"),
        (lambda values: values["results"]["clean"]["intervals"].update(gap=[0.1, "a"]), r"gap\[1\] should be float"),
        (lambda values: values["groups"]["names"].append("one more"), "numbers are not of the 5 groups"),
        (lambda values: values["corruptions"]["results"][0]["correct"].pop(), "on corrupted images are not of"),
    ],
)
def test_damaged_reports_are_refused_by_name(tmp_path: Path, change, message: str) -> None:
    path = write_report(with_breakdowns(), tmp_path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_report(path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    nested = '{"schema_version": 1, "config": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for text in ("{", nested):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=r"report\.json is not a report of ham_hf"):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="schema_version None"):
        read_report(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(1.0), {1, 2}])
def test_values_that_are_not_json_are_refused_early(value: object) -> None:
    with pytest.raises(ValueError, match="config must be finite JSON"):
        dataclasses.replace(make_report(), config={"learning_rate": value})
    with pytest.raises(ValueError, match="history must be finite JSON"):
        dataclasses.replace(make_report().training, history=({"loss": value},))


def make_attack_report(predictions: Sequence[int] = (0, 1, 1, 1)) -> AttackReport:
    labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor(predictions)
    return attack_report(attack_result("pgd-20", {"steps": (1, 2)}, predicted, labels), 2)


def test_attack_report_counts() -> None:
    attack = make_attack_report()
    assert attack.summary.average == 0.75
    assert attack.confusion == ((1, 1), (0, 2))
    assert attack.settings == {"steps": [1, 2]}
    assert attack.title == "PGD-20"


@pytest.mark.parametrize("predictions", [[0, 1, 1, 2], [0, -2, 1, 1], [0, 1, 1]])
def test_predictions_outside_of_the_classes_are_refused(predictions: list[int]) -> None:
    """A prediction of a third class would silently be counted in another row of the confusion matrix."""
    with pytest.raises(ValueError, match=r"predictions in \[0, 2\)"):
        make_attack_report(predictions)


def test_reference_attack_prefers_autoattack_on_the_whole_test_set() -> None:
    attacks = ("clean", "pgd-20", "autoattack")
    assert make_report(attacks=attacks).reference_attack().name == "autoattack"
    assert make_report(attacks=attacks, num_autoattack=50).reference_attack().name == "pgd-20"
    assert make_report(attacks=("clean",)).reference_attack() is None


def test_columns_of_a_table_are_aligned() -> None:
    lines = text_table(results_table(make_report())).splitlines()
    assert len(lines) == 4
    assert {line.index("(") for line in lines[1:]} == {lines[1].index("(")}


def test_number_of_images_beside_an_accuracy_of_a_class_is_its_own() -> None:
    report = make_report(verdict=True, **WITH_AUTOATTACK)
    for row in class_rows(report):
        label = DIGITS.index(row["Class"])
        assert row["Images"] == str(report.results["clean"].summary.per_class[label].count)
        for entry in report.entries():
            own = entry.summary.per_class[label]
            shown = f"{100 * own.accuracy:.1f} ({100 * own.low:.1f}–{100 * own.high:.1f})"
            part = entry.name in ("autoattack", "verdict")
            assert row[entry.title] == (f"{shown} of {own.count}" if part else shown)
    few = class_rows(make_report(verdict=True, attacks=WITH_AUTOATTACK["attacks"], num_autoattack=7))
    assert [row["AutoAttack"] for row in few].count("–") == 3 == len(few) - 7


def test_device_without_a_name_goes_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.mps, "get_device_name", raising=False)
    assert environment(device=torch.device("mps"), num_processes=1).device == "mps"


def test_environment_names_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    found = environment(device=torch.device("cpu"), num_processes=2)
    assert found.versions["torch"] == torch.__version__.split("+")[0] or found.versions["torch"] == torch.__version__
    assert set(found.versions) >= {"ham_hf", "timm", "accelerate", "datasets", "huggingface_hub", "safetensors"}
    assert (found.device, found.num_processes) == ("cpu", 2)
    assert "secret" not in json.dumps(dataclasses.asdict(found))


def test_source_commit_is_dirty_with_changes_and_none_outside_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert source_commit(tmp_path) is None
    git("init")
    assert source_commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit = source_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert source_commit(tmp_path) == f"{commit}-dirty"
    package = tmp_path / "site-packages"
    package.mkdir()
    assert source_commit(package) is None


def test_hub_dataset_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_dataset_id("uoft-cs/cifar10") == "uoft-cs/cifar10"
    assert hub_dataset_id("mnist") == "mnist"
    assert hub_dataset_id("digits") is hub_dataset_id(in_memory.NAME) is None
    assert hub_dataset_id("../data/cifar10") is None
    assert hub_dataset_id(str(tmp_path)) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    assert hub_dataset_id("data/cifar10") is None


@given(st.text())
def test_plain_text_is_one_short_visible_line(value: str) -> None:
    cleaned = plain_text(value, 20)
    assert cleaned
    assert len(cleaned) <= 20
    assert cleaned.isprintable()
    assert cleaned == cleaned.strip()


def test_plain_text_removes_what_reorders_or_hides() -> None:
    assert plain_text("ab\u202ecd\u200b\x07\ud800e\r\n f\u2028g") == "abcde f g"
    assert plain_text(" \n") == "(empty)"
    assert plain_text("abcdef", 4) == "abc…"
