"""The frontier of the fairness dial: average against worst class and worst 30 %."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ham_hf.reporting.calibration import CalibrationReport

_COLORS = {"worst_class": "#D55E00", "worst_30_percent": "#0072B2"}
_LABELS = {"worst_class": "worst class", "worst_30_percent": "mean of the worst 30 %"}


def frontier_figure(report: CalibrationReport) -> Figure:
    """Average (across) against worst classes (up), one point per F with 95 % intervals; the chosen F is filled."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    averages = [100 * point.average for point in report.frontier]
    across = [
        [max(0.0, 100 * (point.average - point.average_low)) for point in report.frontier],
        [max(0.0, 100 * (point.average_high - point.average)) for point in report.frontier],
    ]
    for name, color in _COLORS.items():
        values = [100 * getattr(point, name) for point in report.frontier]
        low = [100 * getattr(point, f"{name}_low") for point in report.frontier]
        high = [100 * getattr(point, f"{name}_high") for point in report.frontier]
        # Percent are rounded once, when drawn: an end that touches its value must not be drawn backwards.
        below = [max(0.0, value - end) for value, end in zip(values, low, strict=True)]
        above = [max(0.0, end - value) for value, end in zip(values, high, strict=True)]
        axes.errorbar(
            averages,
            values,
            xerr=across,
            yerr=[below, above],
            fmt="none",
            color=color,
            linewidth=1.0,
            capsize=2,
            alpha=0.3,
        )
        axes.plot(averages, values, "-o", color=color, markerfacecolor="white", label=_LABELS[name])
        for point, average, value in zip(report.frontier, averages, values, strict=True):
            if point.fairness == report.fairness:
                axes.plot([average], [value], "o", color=color)
            axes.annotate(
                f"{point.fairness:g}",
                (average, value),
                textcoords="offset points",
                xytext=(5, 5) if name == "worst_30_percent" else (5, -11),
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
