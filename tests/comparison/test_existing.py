"""Runs that exist: where they are found, which are seeds of one row, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from ham_hf.comparison.existing import label_runs, read_list, read_runs, split_label
from ham_hf.comparison.pairs import FinishedRun
from ham_hf.comparison.table import compare
from ham_hf.evaluation.verdicts import write_verdicts
from ham_hf.reporting.report import write_report
from tests.support.comparison_reports import CLEAN, METRICS, judged_run, run_report
from tests.support.leaderboard_runs import ranked_run


def found(source: str, label: str = "", *, seed: int = 0, **config: object) -> FinishedRun:
    """A run as it was found, before rows are made."""
    return FinishedRun(label=label, seed=seed, report=run_report({"clean": CLEAN}, seed=seed, **config), source=source)


def test_existing_runs_are_grouped_by_their_settings():
    first = found("a", method="ham", output_dir="x", resume_from_checkpoint=None)
    second = found("b", seed=1, method="ham", output_dir="y", resume_from_checkpoint="latest")
    wider = found("c", method="ham", output_dir="z", resume_from_checkpoint=None, epsilon=0.2)
    others = [found(*names, method="pgd_at", output_dir="w") for names in (["d"], ["e/seed0", "mine"])]
    runs = label_runs([first, second, wider, *others])
    assert [run.source for run in runs] == ["a", "b", "c", "d", "e/seed0"]
    labels = ["ham (epsilon 8/255)", "ham (epsilon 8/255)", "ham (epsilon 0.2)", "pgd_at", "mine"]
    assert [(run.label, run.seed) for run in runs] == list(zip(labels, [0, 1, 0, 0, 0], strict=True))
    shown = compare(runs).rows[1].settings
    assert (shown["epsilon"], shown["method"]) == (0.2, "ham")
    assert not {"seed", "output_dir", "learning_rate"} & set(shown)


def test_setting_younger_than_a_report_has_its_default():
    old = found("old", method="ham")
    new = found("new", seed=1, method="ham", awp_gamma=None, base_loss="pgd_at")
    assert [(one.label, one.seed) for one in label_runs([old, new])] == [("ham", 0), ("ham", 1)]
    runs = label_runs([old, found("perturbed", method="ham", awp_gamma=0.01)])
    assert [one.label for one in runs] == ["ham (awp_gamma null)", "ham (awp_gamma 0.01)"]


def test_setting_that_one_of_two_lacks_has_a_label():
    runs = label_runs([found("s0", "mine"), found("s1", "mine", younger=1)])
    assert [one.label for one in runs] == ["mine (younger (none))", "mine (younger 1)"]


def test_a_label_in_front_names_the_row(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(ranked_run("ham", [5] * 10, learning_rate=len(name) + ord(name[0])).report, tmp_path / name)
    sources = [f"{name} it is={tmp_path / name}" for name in ("one", "two")]
    found = read_runs(sources, lambda *_: pytest.fail("nothing is on the Hub")).found
    assert [run.label for run in label_runs(found)] == ["one it is", "two it is"]
    odd = tmp_path / "a=b"
    write_report(ranked_run("ham", [5] * 10).report, odd)
    assert split_label(str(odd)) == (None, str(odd))
    for wrong in ("=x", "x="):
        with pytest.raises(ValueError, match="expected LABEL=FOLDER or LABEL=OWNER/NAME"):
            split_label(wrong)


def test_one_label_for_several_rows_is_refused(tmp_path: Path) -> None:
    for row in ("a", "b"):
        write_report(ranked_run(row, [5] * 10).report, tmp_path / row / "seed0")
    with pytest.raises(ValueError, match=r"has several rows \(a, b\); label folders in it"):
        read_runs([f"x={tmp_path}"], lambda *_: tmp_path)
    (run,) = label_runs(read_runs([f"x={tmp_path / 'a'}"], lambda *_: tmp_path).found)
    assert (run.label, run.seed) == ("x", 0)


def test_a_list_is_text_or_yaml(tmp_path: Path) -> None:
    wanted = ["me/a", "mine=me/b@v1", "outputs/x"]
    plain = "# models\nme/a\n\nmine=me/b@v1 # the second\noutputs/x\nme/a\n"
    for text in (plain, "---\n- me/a\n- 'mine=me/b@v1'\n- \"outputs/x\"\n"):
        (tmp_path / "list").write_text(text)
        assert read_list(tmp_path / "list") == wanted
    (tmp_path / "list").write_text("# nothing\n")
    with pytest.raises(ValueError, match="lists nothing"):
        read_list(tmp_path / "list")


def test_what_a_list_lacks_is_missing_and_not_fatal(tmp_path: Path) -> None:
    def download(hub_id: str, revision: str | None) -> Path:
        if hub_id != "me/a":
            raise ValueError(f"could not get report.json of {hub_id}")
        write_report(ranked_run("ham", [5] * 10).report, tmp_path)
        return tmp_path

    found = read_runs(["me/a", "me/gone", "name=me/lost"], download, listed=["me/gone", "name=me/lost"])
    assert [run.source for run in found.found] == ["me/a"]
    missing = [(one.label, one.seed, one.state) for one in found.missing]
    assert missing == [("me/gone", None, "failed"), ("name", None, "failed")]
    with pytest.raises(ValueError, match="could not get"):
        read_runs(["me/gone"], download)


def test_predictions_are_read_from_the_folders_of_runs(tmp_path):
    for run in (judged_run("base", [20, 50, 60, 70]), judged_run("own", [40, 60, 70, 80])):
        folder = tmp_path / run.label / "seed0"
        write_report(run.report, folder)
        write_verdicts(run.verdicts, folder)
    sources = [str(tmp_path / label / "seed0") for label in ("base", "own")]

    def read():
        return label_runs(read_runs(sources, download=lambda *_: pytest.fail("nothing is on the Hub")).found)

    comparison = compare(read(), baseline="base")
    assert all(comparison.is_bold("own", "verdict", metric) for metric in METRICS)
    (tmp_path / "own" / "seed0" / "predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"own/seed0/predictions\.parquet is not a table of predictions"):
        read()
