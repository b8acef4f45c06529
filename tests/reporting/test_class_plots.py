"""The figure of what training did to each class shows the history's numbers, and only where there are some."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import CFA
from ham_hf.reporting.figures import class_treatment_figure, per_class_figure, save_figures
from ham_hf.reporting.report import RunReport, read_report
from ham_hf.training.method_state import MethodState
from tests.support.example_report import DIGITS, class_quantity, make_report

EVERYTHING = {"hard_per_class": 4, "class_weight": 4, "class_kl_weight": 0, "class_epsilon": 10}
LONG_NAMES = tuple(f"$\\frac{{{index}}}$ a name too long for any axis {index}\n猫" for index in range(100))


def panels(report: RunReport) -> dict[str, object]:
    """Axes of the heat maps by title."""
    return {axes.get_title(): axes for axes in class_treatment_figure(report).axes if axes.get_images()}


def cells(axes: object) -> np.ma.MaskedArray:
    return axes.get_images()[0].get_array()


def worst_first(report: RunReport) -> list[int]:
    entries = report.results["cw-20"].summary.per_class
    present = [index for index, entry in enumerate(entries) if entry.count]
    missing = [index for index, entry in enumerate(entries) if not entry.count]
    return sorted(present, key=lambda index: entries[index].accuracy) + missing


@pytest.mark.parametrize("treatment", [None, {}], ids=["no such keys", "all None"])
def test_no_figure_where_all_classes_are_treated_alike(tmp_path: Path, treatment: dict[str, int] | None) -> None:
    report = make_report(treatment=treatment)
    assert class_treatment_figure(report) is None
    assert "class_treatment.png" not in {
        path.name for path in save_figures(report, tmp_path, examples=None, train_log=())
    }


def test_no_figure_of_an_evaluation_alone() -> None:
    assert class_treatment_figure(make_report(trained=False)) is None


def test_every_quantity_is_shown_by_class_and_epoch() -> None:
    report = make_report(treatment=EVERYTHING, missing=(3,))
    found = panels(report)
    titles = ["share of hard examples", "weight of the loss", "weight of the KL term", "radius / ε"]
    assert list(found) == titles
    order = worst_first(report)
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
    history = [dict(line) for line in report.training.history]
    history[2]["class_weight"] = None
    del history[4]
    report = dataclasses.replace(report, training=dataclasses.replace(report.training, history=tuple(history)))
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
    history = [
        {**line, "class_epsilon": [8 / 255] * 10, "hard_per_class": [0.0] * 10} for line in report.training.history
    ]
    report = dataclasses.replace(report, training=dataclasses.replace(report.training, history=tuple(history)))
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


def test_a_report_of_the_first_release_shows_its_hard_shares() -> None:
    """It has no other quantity; its warm-up of 2 epochs has none."""
    report = read_report(Path(__file__).resolve().parents[2] / "model_cards/digits-ham")
    younger = ("class_weight", "class_kl_weight", "class_epsilon")
    history = [
        {name: value for name, value in record.items() if name not in younger} for record in report.training.history
    ]
    report = dataclasses.replace(report, training=dataclasses.replace(report.training, history=history))
    ((title, axes),) = panels(report).items()
    assert title == "share of hard examples"
    last = report.training.history[-1]["hard_per_class"]
    assert sorted(cells(axes)[:, -1]) == pytest.approx(sorted(last))
    assert cells(axes).mask[:, :2].all()
    assert not cells(axes).mask[:, 2:].any()


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
    report = dataclasses.replace(
        report,
        training=dataclasses.replace(report.training, history=(json.loads(json.dumps(record)),)),
        threat_model=dataclasses.replace(report.threat_model, epsilon=0.1),
    )
    found = panels(report)
    order = worst_first(report)
    expected = {
        "weight of the cross-entropy": [0.5, 0.75, 1.0, 1.75],
        "weight of the KL term": [0.5, 0.5, 0.5, 2.5],
        "radius / ε": [0.5, 0.75, 1.0, 1.25],
    }
    assert list(found) == list(expected)
    for title, values in expected.items():
        assert list(cells(found[title])[:, 1]) == pytest.approx([values[index] for index in order])
