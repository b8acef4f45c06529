"""The figures show the report's numbers, for few and many classes, and need no display."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ham_hf.reporting import figures
from ham_hf.reporting.figures import (
    confusion_figure,
    examples_figure,
    per_class_figure,
    save_figure,
    save_figures,
    training_figure,
)
from tests.support.example_report import DIGITS, make_examples, make_report, make_train_log

LONG_NAMES = tuple(f"$\\frac{{{index}}}$ a name too long for any axis {index}\n猫" for index in range(12))


@pytest.mark.parametrize(
    ("class_names", "in_chans", "num_images", "missing", "num_epochs", "mining_start_epoch"),
    [(("no", "yes"), 1, 1, (1,), 1, None), (LONG_NAMES, 3, 8, (0, 5), 50, 4)],
    ids=["2 classes", "long names"],
)
def test_figures_have_stable_names_and_draw_any_class_name(
    tmp_path: Path,
    class_names: Sequence[str],
    in_chans: int,
    num_images: int,
    missing: Sequence[int],
    num_epochs: int,
    mining_start_epoch: int | None,
) -> None:
    report = make_report(
        class_names=class_names,
        missing=missing,
        num_epochs=num_epochs,
        treatment={"hard_per_class": 0, "class_weight": 0},
    )
    examples = make_examples(num_images, in_chans=in_chans, num_classes=len(class_names))
    log = make_train_log(num_epochs, mining_start_epoch=mining_start_epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_figures(report, tmp_path, examples=examples, train_log=log)
    names = [
        "per_class_accuracy",
        "training_curves",
        "class_treatment",
        "confusion_pgd-20",
        "confusion_cw-20",
        "adversarial_examples",
    ]
    assert paths == [tmp_path / "figures" / f"{name}.png" for name in names]
    assert sorted((tmp_path / "figures").iterdir()) == sorted(paths)


def test_evaluation_alone_has_one_figure(tmp_path: Path) -> None:
    report = make_report(attacks=("clean",), trained=False)
    paths = save_figures(report, tmp_path, examples=None, train_log=())
    assert [path.name for path in paths] == ["per_class_accuracy.png"]


def test_same_report_gives_same_bytes(tmp_path: Path) -> None:
    first, second = (
        save_figure(training_figure(make_report(), ()), tmp_path / name).read_bytes() for name in ("a.png", "b.png")
    )
    assert first == second


def test_per_class_figure_shows_sorted_accuracies_with_intervals() -> None:
    report = make_report(missing=(3,))
    axes = per_class_figure(report).axes[0]
    robust = report.results["cw-20"].summary.per_class
    order = sorted((index for index in range(10) if index != 3), key=lambda index: robust[index].accuracy)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{DIGITS[index]} ({robust[index].count})" for index in order
    ]
    points = {container.get_label(): container for container in axes.containers}
    assert list(points) == ["Clean", "CW-20"]
    marks, _, (bars,) = points["CW-20"].lines
    assert marks.get_xdata() == pytest.approx([100 * robust[index].accuracy for index in order])
    ends = np.array([[segment[0][0], segment[1][0]] for segment in bars.get_segments()])
    assert ends == pytest.approx(np.array([[100 * robust[index].low, 100 * robust[index].high] for index in order]))
    top, bottom = marks.get_ydata()[0], marks.get_ydata()[-1]
    assert axes.transData.transform((0, top))[1] > axes.transData.transform((0, bottom))[1]
    assert "1 without test images" in axes.get_title()


def test_per_class_figure_of_very_many_classes_has_no_names() -> None:
    report = make_report(class_names=[f"class {index}" for index in range(150)], num_test=3000)
    axes = per_class_figure(report).axes[0]
    assert not any("class" in label.get_text() for label in axes.get_yticklabels())
    assert axes.get_ylabel() == "150 classes, worst first"


def test_training_figure_shades_warm_up_and_averages_epochs() -> None:
    report = make_report(num_epochs=6)
    log = make_train_log(6, mining_start_epoch=4)
    accuracy, hard, loss = training_figure(report, log).axes
    curves = {line.get_label(): line for line in accuracy.get_lines()}
    assert set(curves) == {"clean", "robust", "robust, worst class", "selected epoch"}
    assert list(curves["clean"].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(curves["robust"].get_ydata()) == [line["robust_accuracy"] for line in report.training.history]
    assert list(hard.get_lines()[0].get_xdata()) == [5, 6]
    expected = np.mean([line["loss"] for line in log if line["epoch"] == 2])
    assert loss.get_lines()[0].get_ydata()[2] == pytest.approx(expected)
    # The panel of the hard fraction ends a little above its highest point.
    assert max(hard.get_lines()[0].get_ydata()) < hard.get_ylim()[1] < 1.2 * max(hard.get_lines()[0].get_ydata())
    (warm_up,) = [patch for patch in accuracy.patches if patch.get_label() == "warm-up"]
    assert (warm_up.get_x(), warm_up.get_x() + warm_up.get_width()) == (0.5, 4.5)


def test_training_figure_without_hard_fraction_or_log() -> None:
    report = make_report(num_epochs=1)
    without_mining = training_figure(report, make_train_log(1, mining_start_epoch=None))
    assert [axes.get_ylabel() for axes in without_mining.axes] == ["held-out accuracy", "training loss"]
    assert [axes.get_ylabel() for axes in training_figure(report, ()).axes] == ["held-out accuracy"]


def test_confusion_figure_shows_shares_of_the_true_class() -> None:
    report = make_report(missing=(2,))
    attack, order = report.results["pgd-20"], report.worst_first()
    figure = confusion_figure(attack, DIGITS, order=order)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [DIGITS[index] for index in order]
    shares = figure.axes[0].get_images()[0].get_array()
    counts = np.array(attack.confusion, dtype=float)[np.ix_(order, order)]
    assert order[-1] == 2
    assert shares.mask[9].all()
    np.testing.assert_allclose(shares.filled(-1)[:9], counts[:9] / counts[:9].sum(1, keepdims=True))
    cells = {(int(cell.get_position()[1]), int(cell.get_position()[0])): cell for cell in figure.axes[0].texts}
    assert cells[0, 0].get_text() == f"{100 * shares[0, 0]:.0f}"


def test_confusion_figure_needs_a_matrix() -> None:
    many = make_report(class_names=[str(index) for index in range(201)], num_test=1000)
    with pytest.raises(ValueError, match="no confusion matrix"):
        confusion_figure(many.results["pgd-20"], many.dataset.class_names, order=many.worst_first())


def test_examples_figure_marks_wrong_predictions_and_names_the_factor() -> None:
    examples = make_examples(12, in_chans=3, num_classes=10)
    figure = examples_figure(examples, DIGITS)
    grid = np.array(figure.axes).reshape(3, 8)
    assert [axes.get_title() for axes in grid[0]] == list(DIGITS[:8])
    assert [axes.get_xlabel() for axes in grid[0]] == [f"→ {name}" for name in DIGITS[:8]]
    assert [axes.get_xlabel() for axes in grid[1][:3]] == ["→ zero", "✗ two", "→ two"]
    assert grid[2][0].get_xlabel() == f"max {float((examples.adversarial[0] - examples.clean[0]).abs().max()):.2g}"
    assert grid[2][0].get_ylabel() == "difference × 15"
    shown = torch.from_numpy(np.asarray(grid[2][0].get_images()[0].get_array())).permute(2, 0, 1)
    difference = examples.adversarial[0] - examples.clean[0]
    torch.testing.assert_close(shown, (0.5 + 15 * difference).clamp(0, 1))


def test_no_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyplot keeps figures and picks a display for the whole process: a fresh import of the module does without."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    spec = importlib.util.spec_from_file_location("fresh_figures", figures.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_figures", fresh)
    spec.loader.exec_module(fresh)
    assert fresh.save_figure(fresh.training_figure(make_report(), ()), tmp_path / "a.png").is_file()
