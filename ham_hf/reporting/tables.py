"""The tables of a report as rows for `ham_hf.reporting.formats`: results, classes, groups, corruptions, the frontier.

Accuracies are in percent, intervals are 95 % ones. Names are cleaned (``plain_text``) but not escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from ham_hf.evaluation.calibration import Calibration
from ham_hf.reporting.breakdowns import CorruptionReport, GroupReport
from ham_hf.reporting.formats import (
    class_cell,
    evaluation_title,
    interval_text,
    percent,
    percent_with_ends,
    plain_text,
    ratio,
)
from ham_hf.reporting.report import RunReport

MAX_GROUP_ROWS = 50
"""Groups that a table lists; of more, the weakest."""
FEW_GROUPS = 3
"""Up to here, the worst 30 % of the groups is the worst group."""


def results_table(report: RunReport, *, intervals: bool = False) -> list[dict[str, str]]:
    """One row per evaluation, the verdict first; the number after ± is half the width of the average's interval.

    Args:
        report: a finished run.
        intervals: also show the intervals of the fairness numbers, which make the table wide.
    """
    rows = []
    for attack in report.entries():
        summary = attack.summary
        known = attack.intervals if intervals else None
        half = (summary.average_high - summary.average_low) / 2
        worst_name = plain_text(report.dataset.class_names[summary.worst_class_index], 30)
        seen = f"{summary.num_examples} of {report.dataset.num_test}"
        nsd = "–" if summary.nsd is None else ratio(summary.nsd) + interval_text(known, "nsd", digits=ratio)
        rows.append(
            {
                "Evaluation": attack.title,
                "Images": seen if report.is_subset(attack) else f"{summary.num_examples}",
                "Average": f"{percent(summary.average)} ± {percent(half)}",
                "Macro": percent(summary.macro_average),
                "Worst class": f"{percent(summary.worst_class)}{interval_text(known, 'worst_class')} ({worst_name})",
                "Worst 10 %": percent(summary.worst_10_percent),
                "Worst 30 %": percent(summary.worst_30_percent) + interval_text(known, "worst_30_percent"),
                "Gap": percent(summary.gap) + interval_text(known, "gap"),
                "Std": percent(summary.std) + interval_text(known, "std"),
                "NSD": nsd,
            }
        )
    return rows


def class_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per class with images in `RunReport.ordering_entry`, worst first. "Images": the most of all columns."""
    rows = []
    for index in report.worst_first():
        if report.ordering_entry().summary.per_class[index].count:
            images = max(attack.summary.per_class[index].count for attack in report.results.values())
            row = {"Class": plain_text(report.dataset.class_names[index], 40), "Images": str(images)}
            rows.append(row | {entry.title: class_cell(entry.summary.per_class[index]) for entry in report.entries()})
    return rows


def group_rows(found: GroupReport) -> list[dict[str, str]]:
    """One row per evaluation: worst group, worst 30 % where it says more, and gap, with intervals."""
    rows = []
    for name, result in found.results.items():
        summary, intervals = result.summary, result.intervals
        worst = f"{percent(summary.worst_class)}{interval_text(intervals, 'worst_class')}"
        row = {
            "Evaluation": evaluation_title(name),
            "Average": percent(summary.average),
            "Worst group": f"{worst} {plain_text(found.names[summary.worst_class_index], 30)}",
        }
        if len(found.names) > FEW_GROUPS:
            worst_30 = percent(summary.worst_30_percent) + interval_text(intervals, "worst_30_percent")
            row["Worst 30 % of groups"] = worst_30
        rows.append(row | {"Gap": percent(summary.gap) + interval_text(intervals, "gap")})
    return rows


def each_group_rows(found: GroupReport) -> list[dict[str, str]]:
    """One row per group with images, the worst by the first evaluation first, with Wilson intervals."""
    first = next(iter(found.results.values())).summary.per_class
    clean = found.results["clean"].summary.per_class
    present = [index for index, entry in enumerate(clean) if entry.count]
    present.sort(key=lambda index: (first[index].accuracy is None, first[index].accuracy))
    return [
        {plain_text(found.column, 40): plain_text(found.names[index], 40), "Images": str(clean[index].count)}
        | {evaluation_title(name): class_cell(one.summary.per_class[index]) for name, one in found.results.items()}
        for index in present[:MAX_GROUP_ROWS]
    ]


def corruption_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per corruption: its average at each severity, and what it leaves of the weakest classes.

    Worst class and worst 30 % are of the highest severity that was computed. The last row is the mean over all
    corruptions, whose last cell of accuracy is the mean corruption accuracy.
    """
    found = report.corruptions
    if found is None:
        return []
    names, highest = report.dataset.class_names, max(found.severities)
    clean = report.results["clean"].summary
    rows = [
        {"Corruption": "none", **_severities([clean.average] * len(found.severities), found)}
        | _weakest(clean.worst_class, names[clean.worst_class_index], clean.worst_30_percent, highest)
    ]
    averages = {(entry.name, entry.severity): entry.average for entry in found.results}
    for name in found.names:
        last = next(entry for entry in found.results if (entry.name, entry.severity) == (name, highest))
        rows.append(
            {"Corruption": name, **_severities([averages[name, severity] for severity in found.severities], found)}
            | _weakest(last.worst_class, names[last.worst_class_index], last.worst_30_percent, highest)
        )
    means = [sum(averages[name, severity] for name in found.names) / len(found.names) for severity in found.severities]
    last_row = {"Corruption": f"mean of {len(found.names)}", **_severities(means, found)}
    return [*rows, last_row | dict.fromkeys(_weakest(0, "", 0, highest), "–")]


def corrupted_class_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per class, the worst mean corruption accuracy first, at most `MAX_GROUP_ROWS`."""
    found = report.corruptions
    if found is None:
        return []
    means = [(mean, index) for index, mean in enumerate(found.class_means) if mean is not None]
    clean = report.results["clean"].summary.per_class
    return [
        {
            "Class": plain_text(report.dataset.class_names[index], 40),
            "Images": str(found.counts[index]),
            "Clean": percent(clean[index].accuracy or 0.0),
            "Mean corruption accuracy": percent(mean),
            "Lowest": _lowest(found, index),
        }
        for mean, index in sorted(means)[:MAX_GROUP_ROWS]
    ]


def _severities(averages: Sequence[float], found: CorruptionReport) -> dict[str, str]:
    cells = {
        f"Severity {severity}": percent(average) for severity, average in zip(found.severities, averages, strict=True)
    }
    return {**cells, "Mean": percent(sum(averages) / len(averages))}


def _weakest(worst: float, name: str, worst_30: float, severity: int) -> dict[str, str]:
    return {
        f"Worst class, severity {severity}": f"{percent(worst)} ({plain_text(name, 30)})",
        f"Worst 30 %, severity {severity}": percent(worst_30),
    }


def _lowest(found: CorruptionReport, index: int) -> str:
    lowest = min(found.results, key=lambda entry: entry.correct[index])
    return f"{percent(lowest.correct[index] / found.counts[index])} ({lowest.name}, severity {lowest.severity})"


def breakdown_tables(report: RunReport) -> list[list[dict[str, str]]]:
    """The tables of groups and of corruptions that there are, for a terminal."""
    tables = [] if report.groups is None else [group_rows(report.groups), each_group_rows(report.groups)]
    return tables if report.corruptions is None else [*tables, corruption_rows(report)]


def frontier_rows(found: Calibration) -> list[dict[str, str]]:
    """One row per point of the frontier, with intervals."""
    return [
        {
            "Fairness": f"{point.fairness:g}" + (" (this model)" if point.fairness == found.fairness else ""),
            "Average": percent_with_ends(point.average, point.average_low, point.average_high),
            "Worst class": percent_with_ends(point.worst_class, point.worst_class_low, point.worst_class_high),
            "Worst 30 %": percent_with_ends(
                point.worst_30_percent, point.worst_30_percent_low, point.worst_30_percent_high
            ),
        }
        for point in found.frontier
    ]
