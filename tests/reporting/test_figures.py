"""The figures of a report show its numbers, for few and many classes, and need no display."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import CFA
from ham_hf.reporting import figures
from ham_hf.reporting.figures import (
    ExampleStrip,
    class_treatment_figure,
    confusion_figure,
    examples_figure,
    per_class_figure,
    save_figure,
    save_figures,
    training_figure,
)
from ham_hf.reporting.report import RunReport
from ham_hf.training.method_state import MethodState
from tests.support.documents import with_training
from tests.support.example_report import DIGITS, class_quantity, make_examples, make_report, make_train_log

LONG_NAMES = tuple(f"$\\frac{{{index}}}$ a name too long for any axis {index}\n猫" for index in range(100))
EVERYTHING = {"hard_per_class": 4, "class_weight": 4, "class_kl_weight": 0, "class_epsilon": 10}


@pytest.mark.parametrize(
    ("changes", "mining_start_epoch", "examples"),
    [
        (
            {"class_names": ("no", "yes"), "missing": (1,), "num_epochs": 1},
            None,
            make_examples(1, in_chans=1, num_classes=2),
        ),
        (
            {"class_names": LONG_NAMES[:12], "missing": (0, 5), "num_epochs": 50},
            4,
            make_examples(8, in_chans=3, num_classes=12),
        ),
    ],
    ids=["2 classes", "long names"],
)
def test_figures_have_stable_names_and_draw_any_class_name(
    tmp_path: Path, changes: dict, mining_start_epoch: int | None, examples: ExampleStrip
) -> None:
    report = make_report(treatment={"hard_per_class": 0, "class_weight": 0}, **changes)
    log = make_train_log(changes["num_epochs"], mining_start_epoch=mining_start_epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_figures(report, tmp_path, examples=examples, train_log=log)
    names = ["per_class_accuracy", "training_curves", "class_treatment", "confusion_pgd-20", "confusion_cw-20"]
    names += ["adversarial_examples"]
    assert paths == [tmp_path / "figures" / f"{name}.png" for name in names]
    assert sorted((tmp_path / "figures").iterdir()) == sorted(paths)


def test_evaluation_alone_has_one_figure(tmp_path: Path) -> None:
    report = make_report(attacks=("clean",), trained=False)
    save_figures(make_report(), tmp_path, examples=None, train_log=())
    (tmp_path / "figures/fairness_frontier.png").touch()
    paths = save_figures(report, tmp_path, examples=None, train_log=())
    assert [path.name for path in paths] == ["per_class_accuracy.png"]
    left = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert left == ["per_class_accuracy.png", "training_curves.png"], "none of an evaluation before it"


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
    examples = make_examples(8, in_chans=3, num_classes=10)
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


def panels(report: RunReport) -> dict[str, object]:
    """Axes of the heat maps by title."""
    return {axes.get_title(): axes for axes in class_treatment_figure(report).axes if axes.get_images()}


def cells(axes: object) -> np.ma.MaskedArray:
    return axes.get_images()[0].get_array()


@pytest.mark.parametrize(
    "report",
    [make_report(treatment=None), make_report(treatment={}), make_report(trained=False)],
    ids=["no such keys", "all None", "evaluation"],
)
def test_no_figure_where_all_classes_are_treated_alike(report: RunReport) -> None:
    assert class_treatment_figure(report) is None


def test_every_quantity_is_shown_by_class_and_epoch() -> None:
    report = make_report(treatment=EVERYTHING, missing=(3,))
    found = panels(report)
    titles = ["share of hard examples", "weight of the loss", "weight of the KL term", "radius / ε"]
    assert list(found) == titles
    order = report.worst_first()
    assert order[-1] == 3
    for title, (name, first) in zip(titles, EVERYTHING.items(), strict=True):
        shown = cells(found[title])
        assert shown.shape == (10, 12)
        for row, index in enumerate(order):
            for epoch in range(12):
                value = class_quantity(name, index, epoch, 10)
                if epoch < first or value is None:
                    assert shown.mask[row, epoch], (title, row, epoch)
                else:
                    expected = value / (8 / 255) if name == "class_epsilon" else value
                    assert shown[row, epoch] == pytest.approx(expected)


def test_unknown_is_gray_and_epochs_without_the_quantity_are_blank() -> None:
    found = panels(make_report(treatment=EVERYTHING))
    axes = found["weight of the loss"]
    assert to_hex(axes.get_facecolor()) == "#cccccc"
    (blank,) = axes.patches
    assert to_hex(blank.get_facecolor()) == "#ffffff"
    assert (blank.get_x(), blank.get_x() + blank.get_width()) == (0.5, 4.5)
    assert axes.get_images()[0].get_extent() == [0.5, 12.5, 9.5, -0.5]
    assert not found["weight of the KL term"].patches


def test_gaps_between_epochs_are_blank() -> None:
    report = make_report(treatment={"class_weight": 0}, num_epochs=6)
    # Reports of the first release have no key for what their method lacks.
    history = [{key: value for key, value in line.items() if value is not None} for line in report.training.history]
    history[2]["class_weight"] = None
    del history[4]
    report = with_training(report, history=tuple(history))
    (axes,) = panels(report).values()
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert spans == [(2.5, 3.5), (4.5, 5.5)]
    assert cells(axes).mask[:, [2, 4]].all()


def test_weights_and_radii_have_1_in_the_middle_of_their_scale_and_shares_begin_at_0() -> None:
    figure = class_treatment_figure(make_report(treatment=EVERYTHING))
    maps = [axes for axes in figure.axes if axes.get_images()]
    bars = [axes for axes in figure.axes if not axes.get_images()]
    for axes, bar in zip(maps[1:], bars[1:], strict=True):
        norm = axes.get_images()[0].norm
        assert norm(1.0) == pytest.approx(0.5)
        assert norm.vmin <= cells(axes).min() <= cells(axes).max() <= norm.vmax
        assert bar.get_xlim()[0] >= 0
    norm = maps[0].get_images()[0].norm
    assert bars[0].get_xlim()[0] == 0
    assert norm.vmax == pytest.approx(cells(maps[0]).max())
    blank, zero = maps[0].get_images()[0].cmap(0.0), maps[0].get_images()[0].cmap(norm(0.0))
    assert sum(blank[:3]) - sum(zero[:3]) > 0.2, "a share of 0 must not look like an epoch without shares"


def test_equal_values_have_a_scale_too() -> None:
    report = make_report(treatment={"class_epsilon": 0, "hard_per_class": 0})
    equal = {"class_epsilon": [8 / 255] * 10, "hard_per_class": [0.0] * 10}
    report = with_training(report, history=tuple({**line, **equal} for line in report.training.history))
    for axes in panels(report).values():
        norm = axes.get_images()[0].norm
        assert norm.vmin < cells(axes).min() <= cells(axes).max() < norm.vmax


def test_first_term_is_named_after_the_loss() -> None:
    for config, title in (
        ({"method": "trades"}, "weight of the cross-entropy"),
        ({"method": "ham", "base_loss": "trades"}, "weight of the cross-entropy"),
        ({"method": "ham"}, "weight of the loss"),
        ({"method": "of a later version"}, "weight of the loss"),
    ):
        assert list(panels(make_report(treatment={"class_weight": 0}, config=config))) == [title]


@pytest.mark.parametrize("class_names", [DIGITS, LONG_NAMES], ids=["10", "100"])
def test_names_are_those_of_the_accuracies(class_names: tuple[str, ...]) -> None:
    report = make_report(class_names=class_names, treatment=EVERYTHING, num_test=1000)
    first, *others = panels(report).values()
    names = [label.get_text() for label in first.get_yticklabels()]
    # There the number of images is behind each name.
    counted = [label.get_text() for label in per_class_figure(report).axes[0].get_yticklabels()]
    assert names == [name.rpartition(" (")[0] for name in counted]
    assert [label for axes in others for label in axes.get_yticklabels()] == []
    assert first.get_ylabel() == "classes, worst first (CW-20)"


def test_records_of_a_run_are_understood() -> None:
    """From a method's own state to the figure: CFA after an epoch in which class c was right in c of 4 examples."""
    state = MethodState(CFA(cfa_start_epoch=1), torch.full((4,), 4.0, dtype=torch.float64))
    attack = Attack(threat_model=ThreatModel("linf", 0.1), num_steps=3, step_size=0.05)
    state.states["cfa"]["counts"] = torch.tensor([[c, 4] for c in range(4)], dtype=torch.float64)
    state.begin_epoch(1, lambda part: pytest.fail(f"{part.name} takes nothing from held-out images"))
    log = torch.zeros(5, 4, dtype=torch.float64)
    log[2], log[3], log[4] = 4.0, torch.tensor([2.0, 3.0, 4.0, 7.0]), torch.tensor([1.0, 1.0, 1.0, 5.0])
    record = {"epoch": 1, **state.epoch_record(log, attack, epoch=1)}
    report = make_report(class_names=DIGITS[:4], config={"method": "cfa", "base_loss": "trades"})
    report = with_training(report, history=(json.loads(json.dumps(record)),))
    report = dataclasses.replace(report, threat_model=dataclasses.replace(report.threat_model, epsilon=0.1))
    found = panels(report)
    expected = {
        "weight of the cross-entropy": [0.5, 0.75, 1.0, 1.75],
        "weight of the KL term": [0.5, 0.5, 0.5, 2.5],
        "radius / ε": [0.5, 0.75, 1.0, 1.25],
    }
    assert list(found) == list(expected)
    for title, values in expected.items():
        assert list(cells(found[title])[:, 1]) == pytest.approx([values[index] for index in report.worst_first()])
