"""The figures of a comparison show its numbers, for few and many rows and classes."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex

from ham_hf.comparison import figures
from ham_hf.comparison.figures import class_figure, save_comparison_figures, tradeoff_figure
from ham_hf.comparison.table import compare
from tests.support.comparison_reports import even, run

HOSTILE = "_$\\frac{%d}$ <b> a label that is too long for any legend %d\n猫"


def comparison_of(num_rows: int, num_classes: int, *, seeds: int = 3, label: str = "method %d"):
    dice = random.Random(0)
    names = [f"class {index}" for index in range(num_classes)]

    def counts():
        return even([dice.randint(0, 20) for _ in names])

    def seed_of(row, seed):
        results = {"clean": counts(), "pgd-20": counts()}
        return run(label % ((row,) * label.count("%d")), results, seed=seed, class_names=names)

    return compare([seed_of(row, seed) for row in range(num_rows) for seed in range(seeds)])


@pytest.mark.parametrize(("num_rows", "num_classes", "label"), [(5, 130, "m%d"), (9, 4, HOSTILE)])
def test_figures_of_many_classes_and_of_hostile_labels_are_drawn(tmp_path, num_rows, num_classes, label):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_comparison_figures(comparison_of(num_rows, num_classes, seeds=1, label=label), tmp_path)
    assert paths == [tmp_path / "comparison_tradeoff.png", tmp_path / "comparison_per_class.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_tradeoff_shows_means_and_spread_with_a_mark_of_its_own_for_every_row():
    comparison = comparison_of(15, 10)
    figure = tradeoff_figure(comparison, "pgd-20")
    (axes,) = figure.axes
    marks = set()
    for container, row in zip(axes.containers, comparison.rows, strict=True):
        point, _, (across, down) = container.lines
        numbers = row.attacks["pgd-20"]
        assert point.get_xydata()[0] == pytest.approx([100 * numbers.average.mean, 100 * numbers.worst_class.mean])
        (left, _), (right, _) = across.get_segments()[0]
        assert right - left == pytest.approx(200 * numbers.average.std)
        (_, bottom), (_, top) = down.get_segments()[0]
        assert top - bottom == pytest.approx(200 * numbers.worst_class.std)
        marks.add((point.get_marker(), to_hex(point.get_color())))
    assert len(marks) == 15
    (legend,) = figure.legends
    assert [entry.get_text() for entry in legend.get_texts()] == [row.label for row in comparison.rows]


def test_single_seed_has_no_bars():
    for container in tradeoff_figure(comparison_of(2, 10, seeds=1), "pgd-20").axes[0].containers:
        assert container.lines[2] == ()


@pytest.mark.parametrize(("num_classes", "classes_across"), [(10, True), (100, False)])
def test_class_figure_has_the_percentages_hardest_class_first(num_classes, classes_across):
    comparison = comparison_of(3, num_classes)
    names = comparison.class_names
    axes = class_figure(comparison, "pgd-20", names).axes[0]
    expected = np.array([row.attacks["pgd-20"].per_class for row in comparison.rows])
    order = sorted(range(num_classes), key=lambda index: expected[:, index].mean())
    expected = expected[:, order]
    across = [label.get_text() for label in axes.get_xticklabels()]
    down = [label.get_text() for label in axes.get_yticklabels()]
    assert (across if classes_across else down) == [names[index] for index in order]
    assert (down if classes_across else across) == [row.label for row in comparison.rows]
    shown = axes.get_images()[0].get_array()
    np.testing.assert_allclose(shown if classes_across else shown.T, expected)
    cells = {tuple(int(v) for v in text.get_position()): text for text in axes.texts}
    assert len(cells) == expected.size
    for (row, column), value in np.ndenumerate(expected):
        text = cells[(column, row) if classes_across else (row, column)]
        assert text.get_text() == f"{100 * value:.0f}"
        assert (text.get_fontweight() == "bold") == (value == expected[row].min())


def test_class_without_images_is_gray_and_last():
    results = {"pgd-20": ([10, 0, 5], [20, 0, 20])}
    comparison = compare([run("own", results, class_names=("a", "b", "c"))])
    axes = class_figure(comparison, "pgd-20", ("a", "b", "c")).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "a", "b"]
    assert [text.get_text() for text in axes.texts] == ["25", "50"]


def test_figures_without_numbers_are_left_out_and_removed(tmp_path):
    one = run("one", {"pgd-20": even([1, 2])}, class_names=("a", "b"))
    other = run("other", {"pgd-20": even([1, 2])}, class_names=("c", "d"))
    assert len(save_comparison_figures(compare([one]), tmp_path)) == 2
    assert save_comparison_figures(compare([one, other]), tmp_path) == [tmp_path / "comparison_tradeoff.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["comparison_tradeoff.png"]
    clean = run("clean", {"clean": even([1, 2])}, class_names=("a", "b"))
    assert save_comparison_figures(compare([clean]), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_axes_end_at_0_and_100_and_bars_are_faint():
    runs = [run("own", {"pgd-20": even(n)}, seed=s, class_names=("a", "b")) for s, n in enumerate([[20, 20], [0, 19]])]
    axes = tradeoff_figure(compare(runs), "pgd-20").axes[0]
    assert axes.get_xlim()[1] == axes.get_ylim()[1] == 100
    assert axes.get_ylim()[0] == 0
    point, caps, bars = axes.containers[0].lines
    assert all(line.get_alpha() == 0.4 and line.get_zorder() < point.get_zorder() for line in (*caps, *bars))


def test_unequal_budget_is_said_in_the_figures():
    one, other = (
        run(label, {"pgd-20": even([1, 2])}, class_names=("a", "b"), learning_rate=rate)
        for label, rate in (("one", 0.1), ("other", 0.2))
    )
    for runs, said in (([one], False), ([one, other], True)):
        comparison = compare(runs)
        figures = [tradeoff_figure(comparison, "pgd-20"), class_figure(comparison, "pgd-20", ("a", "b"))]
        assert ["not the same budget" in figure.axes[0].get_title() for figure in figures] == [said, said]


def test_labels_that_are_cut_alike_stay_text_and_different_in_both_figures():
    comparison = comparison_of(2, 3, label="$x$ very long name of a method that goes on (%d)")
    (legend,) = tradeoff_figure(comparison, "pgd-20").legends
    names = [f"$x$ very long name of a method th… #{number}" for number in (1, 2)]
    assert not any(entry.get_parse_math() for entry in legend.get_texts())
    assert [entry.get_text() for entry in legend.get_texts()] == names
    axes = class_figure(comparison, "pgd-20", comparison.class_names).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names


@pytest.mark.parametrize("drawing", ["tradeoff_figure", "class_figure", "save_figure"])
def test_figures_that_cannot_be_drawn_leave_the_earlier_ones(tmp_path, monkeypatch, drawing):
    comparison = compare([run("one", {"pgd-20": even([1, 2])}, class_names=("a", "b"))])
    drawn = {path.name: path.read_bytes() for path in save_comparison_figures(comparison, tmp_path)}

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(figures, drawing, fails)
    with pytest.raises(OSError, match="no space"):
        save_comparison_figures(comparison, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == drawn
