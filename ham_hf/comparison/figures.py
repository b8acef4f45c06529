"""The figures of a comparison: average against worst class, and the accuracy of every class of every row.

Both are of the strongest attack that all runs share. Like those of a report (`ham_hf.reporting.figures`) they are made
without pyplot, in the colors of Okabe and Ito; rows also differ in their marker. Labels are never read as mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ham_hf.comparison.table import Comparison
from ham_hf.reporting.figures import BLUE, GREEN, MAX_NAMED_CLASSES, ORANGE, VERMILLION, save_figure, write_share
from ham_hf.reporting.formats import plain_text

COLORS = (BLUE, VERMILLION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "<")
"""As many as there are colors, and one: 56 rows have 56 combinations."""
MAX_CLASSES_ACROSS = 20


def save_comparison_figures(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Draw ``comparison_tradeoff.png`` and ``comparison_per_class.png`` into ``folder`` (made if needed).

    A figure that there are no numbers for is left out, and one of an earlier comparison removed: both if the runs
    share no attack, that of the classes if the runs do not have the same classes.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tradeoff, per_class = folder / "comparison_tradeoff.png", folder / "comparison_per_class.png"
    attack = comparison.strongest_shared_attack()
    figures = {} if attack is None else {tradeoff: tradeoff_figure(comparison, attack)}
    if attack is not None and comparison.class_names is not None:
        figures[per_class] = class_figure(comparison, attack, comparison.class_names)
    written = [save_figure(figure, path) for path, figure in figures.items()]
    for path in {tradeoff, per_class} - figures.keys():
        path.unlink(missing_ok=True)
    return written


def tradeoff_figure(comparison: Comparison, attack: str) -> Figure:
    """Worst class against average under ``attack``, a mark of its own per row, with the deviation over seeds as bars.

    Axes are zoomed to the points, and end at 0 and 100 %: differences count here, and the tables have the values.
    """
    rows = [row for row in comparison.rows if attack in row.attacks]
    figure = Figure(figsize=(10.0, max(5.4, 1.2 + 0.27 * len(rows))), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        average, worst = row.attacks[attack].average, row.attacks[attack].worst_class
        bars = axes.errorbar(
            100 * average.mean,
            100 * worst.mean,
            xerr=None if average.std is None else 100 * average.std,
            yerr=None if worst.std is None else 100 * worst.std,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLORS[number % len(COLORS)],
            ms=6,
            mec="white",
            mew=0.6,
            elinewidth=1.0,
            capsize=2.5,
            label=str(number),
        )
        point, caps, lines = bars.lines
        point.set(zorder=4, clip_on=False)
        for line in (*caps, *lines):
            line.set(alpha=0.4, zorder=2)
    title = comparison.attacks[attack]
    axes.set_xlabel(f"average accuracy under {title}", parse_math=False)
    axes.set_ylabel(f"worst-class accuracy under {title}", parse_math=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(100))
    axes.margins(0.12)
    axes.set_xlim(*np.clip(axes.get_xlim(), 0, 100))
    axes.set_ylim(*np.clip(axes.get_ylim(), 0, 100))
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    spread = any(row.attacks[attack].average.std is not None for row in rows)
    heading = "Better is up and to the right" + ("\nbars: standard deviation over seeds" if spread else "")
    axes.set_title(heading + _budget_note(comparison), fontsize=11)
    legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    for entry, row in zip(legend.get_texts(), rows, strict=True):
        # Set afterwards: a label that begins with "_" would get no entry, and "$" would be mathematics.
        entry.set_parse_math(False)
        entry.set_text(comparison.names[row.label])
    return figure


def _budget_note(comparison: Comparison) -> str:
    return "\nnot the same budget: see comparison.md" if comparison.unequal else ""


def class_figure(comparison: Comparison, attack: str, class_names: Sequence[str]) -> Figure:
    """Accuracy of every class (mean over seeds) of every row under ``attack``, in percent, hardest class first.

    Up to ``MAX_CLASSES_ACROSS`` classes lie across and rows down; more classes lie down. Each row's worst class is
    bold, a class without test images is gray. Above ``MAX_NAMED_CLASSES`` classes there is no text.
    """
    rows = [row for row in comparison.rows if attack in row.attacks]
    values = np.array([row.attacks[attack].per_class for row in rows], dtype=float)
    known = ~np.isnan(values)
    difficulty = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
    order = np.lexsort((difficulty, ~known.any(0)))
    values, names = values[:, order], [class_names[index] for index in order]
    labels = [comparison.names[row.label] for row in rows]
    if len(names) <= MAX_CLASSES_ACROSS:
        cells, down, across = values, labels, [plain_text(name, 16) for name in names]
    else:
        cells, down, across = values.T, [plain_text(name, 28) for name in names], labels
    named = len(names) <= MAX_NAMED_CLASSES
    height = 1.6 + (0.32 if len(down) <= MAX_CLASSES_ACROSS else 0.17) * len(down) if named else 9.0
    figure = Figure(figsize=(max(6.4, 3.4 + 0.5 * len(across)), max(height, 3.0)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#CCCCCC")
    image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks(range(len(across)), labels=across, fontsize=9, parse_math=False)
    # Short names need not be turned.
    axes.tick_params(axis="x", labelrotation=0 if max(map(len, across)) <= 3 else 90)
    axes.set_xlabel("class, hardest first" if across is not labels else "run")
    if named:
        axes.set_yticks(range(len(down)), labels=down, fontsize=9 if height < 9 else 8, parse_math=False)
        axes.set_ylabel("run" if across is not labels else "class, hardest first")
        worst, by_row = np.nanmin(values, axis=1), cells is values
        size = 9 if len(cells) <= MAX_CLASSES_ACROSS else 7
        for (row, column), value in np.ndenumerate(cells):
            if not np.isnan(value):
                write_share(axes, row, column, value, size=size, bold=value == worst[row if by_row else column])
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(names)} classes, hardest first")
    title = f"Accuracy per class under {comparison.attacks[attack]}, %"
    axes.set_title(title + _budget_note(comparison), fontsize=11, parse_math=False)
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), fraction=0.04, aspect=30)
    return figure
