"""The figures of a report: accuracy and treatment of classes, training curves, confusion, examples, frontier.

Every function returns a matplotlib ``Figure`` made without pyplot, so nothing global is touched and no display is
needed. Colors are those of Okabe and Ito, which color-blind readers can tell apart. Class names are cleaned and cut,
and never parsed as mathematical notation.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from ham_hf.artifacts import FIGURES
from ham_hf.evaluation.calibration import FrontierPoint
from ham_hf.files import replacing
from ham_hf.reporting.class_examples import ExampleStrip
from ham_hf.reporting.formats import plain_text
from ham_hf.reporting.method_text import trained_method
from ham_hf.reporting.report import AttackReport, CalibrationReport, RunReport

DPI = 110
BLUE, VERMILLION, GREEN, ORANGE, GRAY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#7F7F7F"
MAX_NAMED_CLASSES = 120
MAX_CELL_TEXT_CLASSES = 20
PANEL_INCHES = (5.2, 3.7, 3.0, 2.7, 2.5)
"""Width of each panel when there are one, two, three, four, five of them."""
BAR_INCHES = 0.13
"""Height of the color bars."""
UNKNOWN = "#CCCCCC"
SMALLEST_RANGE = 0.01
"""Smallest half range of a scale around 1, so that rounding is not shown as a difference."""


def save_figures(
    report: RunReport, folder: str | Path, *, examples: ExampleStrip | None, train_log: Sequence[Mapping[str, object]]
) -> list[Path]:
    """Draw what ``report`` has numbers for into ``folder/figures/*.png``, and return the files written.

    Figures of numbers that it does not have are removed.

    ``examples`` are for ``adversarial_examples.png``; ``train_log``, the "train" lines of ``metrics.jsonl``, and the
    report's history for ``training_curves.png``. Without them the figure is left out.
    """
    figures = {"per_class_accuracy": per_class_figure(report)}
    history = report.training.history if report.training else ()
    if history or train_log:
        figures["training_curves"] = training_figure(report, train_log)
    if treatment := class_treatment_figure(report):
        figures["class_treatment"] = treatment
    if report.calibration is not None:
        figures["fairness_frontier"] = frontier_figure(report.calibration)
    for attack in report.results.values():
        if attack.name != "clean" and attack.confusion is not None:
            figures[f"confusion_{attack.name}"] = confusion_figure(
                attack, report.dataset.class_names, order=report.worst_first()
            )
    if examples is not None:
        figures["adversarial_examples"] = examples_figure(examples, report.dataset.class_names)
    target = Path(folder) / FIGURES
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):  # of another evaluation of this folder
        if old.stem not in figures and old.stem.startswith(("confusion_", "class_treatment", "fairness_frontier")):
            old.unlink()
    return [save_figure(figure, target / f"{name}.png") for name, figure in figures.items()]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``figure`` as PNG; the same figure gives the same bytes, so that pushing it again changes nothing."""
    with warnings.catch_warnings(), replacing(path) as part:
        # Class names in a script that the font lacks show as boxes; a warning per character does not help.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(part, format="png", dpi=DPI, metadata={"Software": None})
    return path


def per_class_figure(report: RunReport) -> Figure:
    """Clean against robust accuracy of every class, worst first, with 95 % intervals and the number of images.

    A class without a test image has no accuracy and is left out; dashed lines are the averages over all images.
    Above ``MAX_NAMED_CLASSES`` classes there are no names, and bands instead of bars.
    """
    attack = report.reference_attack()
    series = [(report.results["clean"], BLUE, "o")] if "clean" in report.results else []
    if attack is not None:
        series.append((attack, VERMILLION, "D"))
    order_by = attack or report.results["clean"]
    entries = order_by.summary.per_class
    classes = [index for index in report.worst_first() if entries[index].count]
    named = len(classes) <= MAX_NAMED_CLASSES
    height = 1.3 + _row_inches(len(classes)) * len(classes) if named else 9.0
    figure = Figure(figsize=(7.2, max(height, 2.4)), layout="constrained")
    axes = figure.add_subplot()
    for number, (result, color, marker) in enumerate(series):
        # Shifted a little against each other, so that overlapping intervals stay readable.
        shift = (0.5 * (len(series) - 1) - number) * 0.22
        _draw_classes(axes, result, classes, shift=shift, color=color, marker=marker)
        axes.axvline(100 * result.summary.average, color=color, linewidth=1.2, linestyle="--", alpha=0.7, zorder=1)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    if named:
        names = [plain_text(report.dataset.class_names[index], 28) for index in classes]
        counts = [dict.fromkeys(result.summary.per_class[index].count for result, *_ in series) for index in classes]
        shown = [f"{name} ({', '.join(map(str, own))})" for name, own in zip(names, counts, strict=True)]
        _name_rows(axes, shown)
        axes.set_ylabel("class (images)")
    else:
        axes.set_ylabel(f"{len(classes)} classes, worst first")
    axes.set_xlim(-4, 104)
    # Intervals end at 0 and 100 %, and must not run into a frame.
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PercentFormatter(100))
    axes.set_xlabel("accuracy on test images (with 95 % interval; dashed: average)")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    missing = len(entries) - len(classes)
    note = f" ({missing} without test images)" if missing else ""
    titles = " and ".join(result.title for result, *_ in series)
    axes.set_title(f"Accuracy per class{note}: {titles}", fontsize=11, parse_math=False)
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
    return figure


def training_figure(report: RunReport, train_log: Sequence[Mapping[str, object]]) -> Figure:
    """Held-out accuracies, hard fraction and loss per epoch; the warm-up is shaded, the selected epoch marked.

    Accuracies are the last of each epoch, loss and hard fraction means of its lines; without any, a panel is left out.
    """
    history = report.training.history if report.training else ()
    curves = {
        "held-out accuracy": [
            ("clean", BLUE, "-", _per_epoch(history, "clean_accuracy", last=True)),
            ("robust", VERMILLION, "-", _per_epoch(history, "robust_accuracy", last=True)),
            ("robust, worst class", ORANGE, "-", _per_epoch(history, "worst_class", last=True)),
        ],
        "hard fraction": [("hard examples", GREEN, "-", _per_epoch(train_log, "hard_fraction"))],
        "training loss": [("loss", GRAY, "-", _per_epoch(train_log, "loss"))],
    }
    panels = {title: lines for title, lines in curves.items() if any(points for *_, points in lines)}
    heights = [2.6 if title == "held-out accuracy" else 1.4 for title in panels] or [2.6]
    figure = Figure(figsize=(7.2, 1.3 + sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
        for label, color, style, points in lines:
            marker = "o" if len(points) <= 40 else None
            axes.plot(list(points), list(points.values()), style, color=color, marker=marker, ms=3.5, label=label)
        axes.set_ylabel(title)
        axes.grid(color="#DDDDDD", linewidth=0.8)
        _mark_epochs(axes, report)
        if title == "held-out accuracy":
            axes.set_ylim(-0.02, 1.02)
        else:
            highest = max(value for *_, points in lines for value in points.values())
            axes.set_ylim(0, 1.1 * highest or 1.0)
        if title != "training loss":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if axes is all_axes[0]:
            figure.legend(
                *axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9
            )
    all_axes[-1].set_xlabel("epoch")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    last = max((epoch for lines in panels.values() for *_, points in lines for epoch in points), default=1)
    all_axes[-1].set_xlim(0.5, last + 0.5)
    return figure


def confusion_figure(attack: AttackReport, class_names: Sequence[str], *, order: Sequence[int]) -> Figure:
    """Share of each true class (row) that is predicted as each class (column) under ``attack``.

    Classes lie in ``order``, the worst first. Rows of classes without test images are gray. Up to
    ``MAX_CELL_TEXT_CLASSES`` classes the cells carry numbers.

    Raises:
        ValueError: if the report has no confusion matrix for the attack.
    """
    if attack.confusion is None:
        raise ValueError(f"{attack.name} has no confusion matrix: too many classes")
    counts = torch.tensor(attack.confusion, dtype=torch.float64)
    totals = torch.tensor([[entry.count] for entry in attack.summary.per_class], dtype=torch.float64)
    shares = torch.where(totals > 0, counts / totals.clamp(min=1), torch.nan)[list(order)][:, list(order)]
    num_classes = len(shares)
    side = min(11.0, max(4.2, 2.4 + (0.42 if num_classes <= MAX_CELL_TEXT_CLASSES else 0.13) * num_classes))
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#CCCCCC")
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = [plain_text(class_names[index], 16) for index in order]
    size = 9 if num_classes <= MAX_CELL_TEXT_CLASSES else 7
    step = math.ceil(num_classes / 60)
    ticks = range(0, num_classes, step)
    axes.set_xticks(ticks, labels=[names[i] for i in ticks], rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, labels=[names[i] for i in ticks], fontsize=size, parse_math=False)
    if num_classes <= MAX_CELL_TEXT_CLASSES:
        for row, column in torch.nonzero(shares >= 0.005).tolist():
            write_share(axes, row, column, float(shares[row, column]), size=9)
    axes.set_xlabel(f"predicted under {attack.title}", parse_math=False)
    axes.set_ylabel("true class, worst first")
    axes.set_title(f"Confusion under {attack.title}, % of the true class", fontsize=11, parse_math=False)
    figure.colorbar(image, ax=axes, shrink=0.8, format=PercentFormatter(1.0))
    return figure


def write_share(axes: Axes, down: int, across: int, share: float, *, size: int, bold: bool = False) -> None:
    """Percent in a cell of a map of shares whose color grows with the share."""
    color = "white" if share > 0.55 else "black"
    weight = "bold" if bold else "normal"
    axes.text(across, down, f"{100 * share:.0f}", ha="center", va="center", color=color, size=size, weight=weight)


def examples_figure(examples: ExampleStrip, class_names: Sequence[str]) -> Figure:
    """Rows of clean images, adversarial images, and their amplified difference around mid-gray.

    The caption under each image is the model's prediction; a wrong one is marked with a cross and in red. That under a
    difference is its largest absolute value.
    """
    clean, adversarial = examples.clean, examples.adversarial
    difference = adversarial - clean
    largest = float(difference.abs().max())
    factor = max(1, math.floor(0.5 / largest)) if largest > 0 else 1
    rows = [clean, adversarial, (0.5 + factor * difference).clamp(0, 1)]
    columns = len(clean)
    # Captions belong to the image above them, hence the space.
    figure = Figure(figsize=(max(3.6, 1.1 + 1.25 * columns), 5.6), layout=ConstrainedLayoutEngine(hspace=0.12))
    grid = figure.subplots(3, columns, squeeze=False)
    for axes_row, images in zip(grid, rows, strict=True):
        for axes, pixels in zip(axes_row, images, strict=True):
            gray = pixels.shape[0] == 1
            shown = pixels[0] if gray else pixels.permute(1, 2, 0)
            axes.imshow(shown.numpy(), cmap="gray" if gray else None, vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for column in range(columns):
        label = int(examples.labels[column])
        grid[0, column].set_title(plain_text(class_names[label], 14), fontsize=9, parse_math=False)
        for row, predictions in enumerate((examples.clean_predictions, examples.adversarial_predictions)):
            predicted = int(predictions[column])
            caption = plain_text(class_names[predicted], 14) if predicted >= 0 else "not finite"
            right = predicted == label
            color = "black" if right else VERMILLION
            text = f"{'→' if right else '✗'} {caption}"
            grid[row, column].set_xlabel(text, fontsize=9, color=color, parse_math=False, labelpad=2)
        grid[2, column].set_xlabel(f"max {float(difference[column].abs().max()):.2g}", fontsize=9, labelpad=2)
    for axes, title in zip(grid[:, 0], ("clean", examples.attack, f"difference × {factor}"), strict=True):
        axes.set_ylabel(title, fontsize=10, parse_math=False)
    figure.suptitle("True class above each column; below each image what the model takes it for", fontsize=10)
    return figure


def _row_inches(num_classes: int) -> float:
    return 0.30 if num_classes <= 30 else 0.17


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), labels=names, fontsize=10 if len(names) <= 30 else 8, parse_math=False)


def _draw_classes(
    axes: Axes, result: AttackReport, classes: Sequence[int], *, shift: float, color: str, marker: str
) -> None:
    """One row per class: dots with interval bars or, for more classes than there is room for, a line with a band.

    A class that this evaluation has no image of gets none.
    """
    entries = [(row, result.summary.per_class[index]) for row, index in enumerate(classes)]
    found = [(row, 100 * e.low, 100 * e.accuracy, 100 * e.high) for row, e in entries if e.count]  # type: ignore[operator]
    rows, low, middle, high = np.array(found, dtype=float).reshape(-1, 4).T
    if len(classes) > MAX_NAMED_CLASSES:
        axes.fill_betweenx(rows, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(middle, rows, color=color, linewidth=1.2, label=result.title)
        return
    size, width = (3, 0.8) if len(classes) > 30 else (5.5, 1.3)
    bars = (middle - low, high - middle)
    axes.errorbar(
        middle, rows + shift, xerr=bars, fmt=marker, color=color, ms=size, elinewidth=width, label=result.title
    )


def _per_epoch(lines: Sequence[Mapping[str, object]], key: str, *, last: bool = False) -> dict[int, float]:
    """Value of ``key`` by epoch, counted from 1: the mean over the epoch's lines, or the last of them."""
    values: defaultdict[int, list[float]] = defaultdict(list)
    for line in lines:
        value, epoch = line.get(key), line.get("epoch")
        if isinstance(value, (int, float)) and isinstance(epoch, (int, float)):
            values[int(epoch) + 1].append(float(value))
    return {epoch: found[-1] if last else sum(found) / len(found) for epoch, found in sorted(values.items())}


def _mark_epochs(axes: Axes, report: RunReport) -> None:
    method = trained_method(report.config)
    if method is not None and method.warmup_epochs:
        axes.axvspan(0.5, method.warmup_epochs + 0.5, color="#EEEEEE", zorder=0, label="warm-up")
    if report.training and report.training.selected_epoch is not None:
        selected = report.training.selected_epoch + 1
        axes.axvline(selected, color=GRAY, linewidth=1.2, linestyle="--", zorder=1, label="selected epoch")


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """One quantity of each class in each epoch.

    ``values`` are (C, epochs), NaN where the class has none; ``present`` (epochs,), whether the epoch has any.
    Where ``centered``, 1 stands for plain training; otherwise values are shares.
    """

    title: str
    values: NDArray[np.float64]
    present: NDArray[np.bool_]
    centered: bool


def class_treatment_figure(report: RunReport) -> Figure | None:
    """Heat maps of what training did to each class, a panel per quantity; None if it treated all classes alike.

    Rows are classes, the worst of the evaluation first and those without test images last; columns are epochs, from
    the first one on that has any of the quantities. Cells are gray where a class has no value (no example of it was
    seen); epochs without the quantity are blank. Above ``MAX_NAMED_CLASSES`` classes there are no names.
    """
    panels = class_treatments(report)
    if not panels:
        return None
    order = report.worst_first()
    named = len(order) <= MAX_NAMED_CLASSES
    height = max(2.3, _row_inches(len(order)) * len(order)) if named else 7.4
    width = 2.4 + PANEL_INCHES[len(panels) - 1] * len(panels)
    figure = Figure(figsize=(width, height + 1.6), layout="constrained")
    all_axes, bars = figure.subplots(2, len(panels), squeeze=False, height_ratios=(height, BAR_INCHES))
    first = min(int(panel.present.argmax()) for panel in panels)
    for axes, bar, panel in zip(all_axes, bars, panels, strict=True):
        _heat_map(axes, bar, panel, order, interpolation="nearest" if named else "antialiased")
        axes.set_xlim(left=first + 0.5)
        axes.set_xlabel(f"epoch (not shown: 1 to {first}, all classes alike)" if first else "epoch")
    if named:
        _name_rows(all_axes[0], [plain_text(report.dataset.class_names[index], 28) for index in order])
    counted = "classes" if named else f"{len(order)} classes"
    all_axes[0].set_ylabel(f"{counted}, worst first ({report.ordering_entry().title})", parse_math=False)
    figure.suptitle("What training did to each class", fontsize=11)
    return figure


def class_treatments(report: RunReport) -> list[Treatment]:
    """The quantities that the report's training history has numbers of, in the order of the figure."""
    if report.training is None:
        return []
    method = trained_method(report.config)
    first_term = "loss" if method is None or method.num_terms == 1 else "cross-entropy"
    quantities = (
        ("hard_per_class", "share of hard examples", 1.0, False),
        ("start_wrong_per_class", "share wrong at the start", 1.0, False),
        ("class_weight", f"weight of the {first_term}", 1.0, True),
        ("class_kl_weight", "weight of the KL term", 1.0, True),
        ("class_epsilon", "radius / ε", report.threat_model.epsilon, True),
    )
    found = []
    for key, title, unit, centered in quantities:
        rows = _by_epoch(report.training.history, key)
        values = np.full((len(report.dataset.class_names), len(rows)), np.nan)
        for epoch, row in enumerate(rows):
            if row is not None:
                values[:, epoch] = [np.nan if value is None else value / unit for value in row]
        if not np.isnan(values).all():
            present = np.array([row is not None for row in rows])
            found.append(Treatment(title=title, values=values, present=present, centered=centered))
    return found


def _by_epoch(history: Sequence[Mapping[str, object]], key: str) -> list[list[float | None] | None]:
    """The list under ``key`` of every epoch from the first to the last, None where there is none."""
    found = {line["epoch"]: line.get(key) for line in history if isinstance(line.get("epoch"), int)}
    lists = {epoch: value for epoch, value in found.items() if isinstance(value, list)}
    return [lists.get(epoch) for epoch in range(max(found, default=-1) + 1)]  # type: ignore[type-var, operator]


def _heat_map(axes: Axes, bar: Axes, panel: Treatment, order: Sequence[int], *, interpolation: str) -> None:
    num_classes, num_epochs = panel.values.shape
    known = panel.values[~np.isnan(panel.values)]
    if panel.centered:
        half = max(SMALLEST_RANGE, float(np.abs(known - 1).max()))
        colors, low, high = "RdBu_r", 1.0 - half, 1.0 + half
    else:
        # The map begins below 0, so that a share of 0 is not as white as an epoch without shares.
        high = float(known.max()) or 1.0
        colors, low = "Greens", -0.2 * high
    axes.set_facecolor(UNKNOWN)
    image = axes.imshow(
        np.ma.masked_invalid(panel.values[list(order)]),
        cmap=colors,
        norm=Normalize(low, high),
        interpolation=interpolation,
        aspect="auto",
        extent=(0.5, num_epochs + 0.5, num_classes - 0.5, -0.5),
    )
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ~panel.present, [False]])))
    for start, end in edges.reshape(-1, 2):
        axes.axvspan(start + 0.5, end + 0.5, color="white", linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_yticks([])
    axes.set_title(panel.title, fontsize=10)
    percent = None if panel.centered else PercentFormatter(1.0)
    axes.figure.colorbar(image, cax=bar, orientation="horizontal", format=percent)
    bar.set_xlim(left=max(0.0, low))
    bar.tick_params(labelsize=8)
    if panel.centered:
        ends = [max(0.0, low), 1.0, high]
        bar.set_xticks(ends, labels=[f"{end:.3g}" for end in ends])
        bar.set_xlabel("1 = as in plain training", fontsize=8)
    else:
        bar.xaxis.set_major_locator(MaxNLocator(nbins=4))


def frontier_figure(report: CalibrationReport) -> Figure:
    """Average (across) against worst classes (up), one point per F with 95 % intervals; the chosen F is filled."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    averages, across = _with_bars(report.frontier, "average")
    for name, label, color, below in (
        ("worst_class", "worst class", VERMILLION, True),
        ("worst_30_percent", "mean of the worst 30 %", BLUE, False),
    ):
        values, bars = _with_bars(report.frontier, name)
        axes.errorbar(
            averages, values, xerr=across, yerr=bars, fmt="none", color=color, linewidth=1.0, capsize=2, alpha=0.3
        )
        axes.plot(averages, values, "-o", color=color, markerfacecolor="white", label=label)
        for point, average, value in zip(report.frontier, averages, values, strict=True):
            if point.fairness == report.fairness:
                axes.plot([average], [value], "o", color=color)
            axes.annotate(
                f"{point.fairness:g}",
                (average, value),
                textcoords="offset points",
                xytext=(5, -11) if below else (5, 5),
                fontsize=8,
                color=color,
                parse_math=False,
            )
    for formatted in (axes.xaxis, axes.yaxis):
        formatted.set_major_formatter(PercentFormatter(100, decimals=0))
    axes.set_xlabel("average (bars: 95 % intervals)")
    axes.set_ylabel("accuracy of the worst classes")
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    steps = report.attack.get("num_steps")
    axes.set_title(f"What fairness costs: held-out images under CW-{steps}, by fairness F", fontsize=11)
    axes.legend(loc="lower left", frameon=False)
    return figure


def _with_bars(points: Sequence[FrontierPoint], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One number of each point in percent, and how far its interval reaches below and above.

    Percent are rounded once, when drawn: an end that touches its value must not be drawn backwards.
    """
    ends = ("", "_low", "_high")
    values, low, high = (np.array([100 * getattr(point, f"{name}{end}") for point in points]) for end in ends)
    return values, np.maximum([values - low, high - values], 0)
