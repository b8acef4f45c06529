"""The figure of what a training method did to each class in each epoch: hard examples, weights of the loss, radii."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from ham_hf.reporting.method_text import trained_method
from ham_hf.reporting.report import RunReport, plain_text

MAX_NAMED_CLASSES = 120
PANEL_INCHES = (5.2, 3.7, 3.0, 2.7, 2.5)
"""Width of each panel when there are one, two, three, four, five of them."""
BAR_INCHES = 0.13
"""Height of the color bars."""
UNKNOWN = "#CCCCCC"
SMALLEST_RANGE = 0.01
"""Half the range of a scale around 1 at the least, so that rounding is not shown as a difference."""


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """One quantity of each class in each epoch.

    Attributes:
        title: what it is.
        values: (C, epochs) float64; NaN where the class has no value.
        present: (epochs,) bool, whether the epoch has the quantity at all.
        centered: whether 1 stands for plain training; otherwise values are shares.
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
    attack = report.verdict or report.reference_attack() or next(iter(report.results.values()))
    order = report.worst_first()
    named = len(order) <= MAX_NAMED_CLASSES
    row_height = 0.30 if len(order) <= 30 else 0.17
    height = max(2.3, row_height * len(order)) if named else 7.4
    width = 2.4 + PANEL_INCHES[len(panels) - 1] * len(panels)
    figure = Figure(figsize=(width, height + 1.6), layout="constrained")
    all_axes, bars = figure.subplots(2, len(panels), squeeze=False, height_ratios=(height, BAR_INCHES))
    first = min(int(panel.present.argmax()) for panel in panels)
    for axes, bar, panel in zip(all_axes, bars, panels, strict=True):
        _heat_map(axes, bar, panel, order, interpolation="nearest" if named else "antialiased")
        axes.set_xlim(left=first + 0.5)
        axes.set_xlabel(f"epoch (not shown: 1 to {first}, all classes alike)" if first else "epoch")
    if named:
        names = [plain_text(report.dataset.class_names[index], 28) for index in order]
        size = 10 if row_height > 0.2 else 8
        all_axes[0].set_yticks(range(len(order)), labels=names, fontsize=size, parse_math=False)
    counted = "classes" if named else f"{len(order)} classes"
    all_axes[0].set_ylabel(f"{counted}, worst first ({attack.title})", parse_math=False)
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
    for start, end in _runs(~panel.present):
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


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
